"""The ops that the project exists for, as checked Python functions over torch.ops.piece_ds.

Importing this package registers the schemas and the reference provider. See schema.py for the list and
reference.py for the exact meaning; `python -m piece_ds.ops` prints which provider serves which op.
"""

import torch
from torch import Tensor

from piece_ds.ops import reference, schema
from piece_ds.ops.backends import provider

__all__ = [
    "accumulate_",
    "apply_mask_",
    "digit_histogram_",
    "index_to_mask",
    "mask_to_index",
    "provider",
    "reference",
    "schema",
    "score",
]


def accumulate_(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor, scale: float, num_nonfinite: Tensor) -> None:
    """Add one micro-batch's gradient to the running sums, in place.

    Args:
        grad: bf16, fp16 or fp32, 1-D, contiguous. Not modified.
        grad_sum: fp32, as long as grad, or None where only squares are needed.
        square_sum: fp32, as long as grad.
        scale: factor applied in fp32 before both sums; the inverse of a loss scale.
        num_nonfinite: int64, one element; receives the number of NaN and infinite entries, which count as 0.
    Cost: reads grad once, reads and writes each sum once.
    """
    if grad.dim() != 1 or grad.shape != square_sum.shape or (grad_sum is not None and grad_sum.shape != grad.shape):
        raise ValueError(f"accumulate_ expected equal 1-D shapes, got grad {tuple(grad.shape)}, sums "
                         f"{tuple(square_sum.shape)}: pass the owned fragment of the gradient")  # fmt: skip
    torch.ops.piece_ds.accumulate_(grad, grad_sum, square_sum, scale, num_nonfinite)


def score(grad_sum: Tensor | None, square_sum: Tensor, lam: float = 1.0) -> Tensor:
    """|grad_sum| / sqrt(square_sum + lam), or a copy of square_sum where grad_sum is None; fp32, >= +0, never NaN.

    Source: arXiv 2511.15375, second-order normalization (PIECE-S) and Fisher (PIECE-F).
    """
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}: it keeps the division defined where no gradient came")
    return torch.ops.piece_ds.score(grad_sum, square_sum, lam)


def digit_histogram_(counts: Tensor, score: Tensor, shift: int, bits: int, prefix: int) -> None:
    """Add to counts how often each `bits`-wide digit at bit `shift` occurs among keys that start with prefix.

    Args:
        counts: int64, 2**bits elements. Written.
        score: fp32, 1-D, >= +0 and not NaN; its key is its 31 low bits, whose order is the order of the scores.
        shift, bits: position and width of the digit; shift + bits == 31 means the leading digit (prefix unused).
        prefix: value of the bits above the digit.
    """
    torch.ops.piece_ds.digit_histogram_(counts, score, shift, bits, prefix)


def index_to_mask(index: Tensor, n: int) -> Tensor:
    """Packed bits (uint8, ceil(n / 8)) with ones at index (int64, unique, in [0, n)); padding bits are zero."""
    return torch.ops.piece_ds.index_to_mask(index, n)


def mask_to_index(bits: Tensor) -> Tensor:
    """Ascending positions (int64) of the ones in packed bits (uint8)."""
    return torch.ops.piece_ds.mask_to_index(bits)


def apply_mask_(grad: Tensor, index: Tensor) -> None:
    """Zero a 1-D gradient outside index (int64). Entries are selected, not multiplied: inf and NaN do not leak."""
    torch.ops.piece_ds.apply_mask_(grad, index)
