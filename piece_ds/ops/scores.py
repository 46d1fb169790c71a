"""Turn gradients into scores, and scores into the elements with the highest ones.

A function that takes (grad_sum, square_sum, lam) works on the scores that score() would return. They are never stored;
(None, x, lam) stands for the scores x themselves. A score's key is its 31 low bits as an integer. Scores are never
negative, so the order of keys is the order of scores.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from piece_ds.ops.backends import load_for


def accumulate_(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor, scale: float, num_nonfinite: Tensor) -> None:
    """Add one micro-batch's gradient to the running sums, in place.

    Args:
        grad: bf16, fp16 or fp32, 1-D, contiguous. Not modified.
        grad_sum: fp32, as long as grad, or None if only squares are needed.
        square_sum: fp32, as long as grad.
        scale: factor applied in fp32 before both sums; the inverse of a loss scale.
        num_nonfinite: int64, one element. The number of NaN and infinite entries, which count as 0, is added to it.
    Raises:
        ValueError: the shapes differ.
    Cost: reads grad once, reads and writes each sum once.
    """
    _check_sums(grad, grad_sum, square_sum)
    load_for(grad)
    torch.ops.piece_ds.accumulate_(grad, grad_sum, square_sum, scale, num_nonfinite)


def score(grad_sum: Tensor | None, square_sum: Tensor, lam: float = 1.0) -> Tensor:
    """Return |grad_sum| / sqrt(square_sum + lam), or a copy of square_sum if grad_sum is None. Fp32, >= +0, never NaN.

    Raises:
        ValueError: lam is not positive.
    Source: arXiv 2511.15375, second-order normalization (PIECE-S) and Fisher (PIECE-F).
    """
    _check_lam(lam)
    load_for(square_sum)
    return torch.ops.piece_ds.score(grad_sum, square_sum, lam)


@dataclass(frozen=True)
class Candidates:
    """Room for elements whose score reaches a bound.

    Attributes:
        score: fp32, capacity elements; the first count() of them are valid.
        index: int64, same length: the element's position.
        num_found: int64, one element; more than the capacity if not everything found had room.
    """

    score: Tensor
    index: Tensor
    num_found: Tensor

    def count(self) -> int:
        """Return the number of elements found, with or without room for them. Waits for the device."""
        return int(self.num_found)

    @property
    def capacity(self) -> int:
        """Number of elements that there is room for."""
        return self.score.numel()


def accumulate_filter_(
    grad: Tensor,
    grad_sum: Tensor | None,
    square_sum: Tensor,
    scale: float,
    num_nonfinite: Tensor,
    lam: float,
    bound: float,
    offset: int,
    candidates: Candidates,
) -> None:
    """Add a gradient as accumulate_() does and filter the new sums as filter_() does, in one pass over them.

    Args:
        grad, grad_sum, square_sum, scale, num_nonfinite: as in accumulate_().
        lam, bound, offset, candidates: as in filter_().
    """
    _check_sums(grad, grad_sum, square_sum)
    _check_lam(lam)

    # In the schema's order: ops take positional arguments.
    load_for(grad)
    torch.ops.piece_ds.accumulate_filter_(
        grad,
        grad_sum,
        square_sum,
        scale,
        num_nonfinite,
        lam,
        bound,
        offset,
        candidates.score,
        candidates.index,
        candidates.num_found,
    )


def empty_candidates(capacity: int, device: torch.device | str) -> Candidates:
    """Return room for capacity candidates, 12 bytes each."""
    return Candidates(
        torch.empty(capacity, dtype=torch.float32, device=device),
        torch.empty(capacity, dtype=torch.int64, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )


def score_histogram_(
    counts: Tensor,
    grad_sum: Tensor | None,
    square_sum: Tensor,
    lam: float,
    shift: int,
    bits: int,
    prefix: int,
    run: int = 1,
    stride: int = 1,
) -> None:
    """Add to counts how often each `bits`-wide digit at bit `shift` occurs among keys that start with prefix.

    Args:
        counts: int64, 2**bits elements. Written.
        grad_sum, square_sum, lam: the scores.
        shift, bits: position and width (at most 16) of the digit. shift + bits == 31 means the leading digit (prefix
        unused). bits == 0 counts the keys whose leading bits equal prefix.
        prefix: value of the bits above the digit.
        run, stride: only elements i with i % stride < run count: a sample.
    Cost: reads the sampled elements once.
    """
    _check_lam(lam)
    load_for(square_sum)
    torch.ops.piece_ds.score_histogram_(counts, grad_sum, square_sum, lam, shift, bits, prefix, run, stride)


def filter_(
    grad_sum: Tensor | None, square_sum: Tensor, lam: float, bound: float, offset: int, candidates: Candidates
) -> None:
    """Append every element with score >= bound to candidates, as (score, offset + position), in any order.

    candidates.num_found also counts elements without room; those with room are then an arbitrary part.

    Args:
        grad_sum, square_sum, lam: the scores.
        bound: least score to keep.
        offset: added to positions.
        candidates: receives what is found.
    Cost: one read of the sums.
    """
    _check_lam(lam)
    load_for(square_sum)
    torch.ops.piece_ds.filter_(
        grad_sum, square_sum, lam, bound, offset, candidates.score, candidates.index, candidates.num_found
    )


def select_above(grad_sum: Tensor | None, square_sum: Tensor, lam: float, key: int, num_ties: int) -> Tensor:
    """Return ascending positions (int64) of scores with a greater key, and of the first num_ties with exactly this one.

    Args:
        grad_sum, square_sum, lam: the scores.
        key: of the threshold.
        num_ties: number of elements with that key to take.
    Cost: one or two reads of the sums. Waits for the device.
    """
    _check_lam(lam)
    load_for(square_sum)
    return torch.ops.piece_ds.select_above(grad_sum, square_sum, lam, key, num_ties)


def _check_sums(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor) -> None:
    if grad.dim() != 1 or grad.shape != square_sum.shape or (grad_sum is not None and grad_sum.shape != grad.shape):
        raise ValueError(
            f"accumulate_ expected equal 1-D shapes, got grad {tuple(grad.shape)}, sums "
            f"{tuple(square_sum.shape)}: pass the owned fragment of the gradient"
        )


def _check_lam(lam: float) -> None:
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}: it keeps the division defined where no gradient came")
