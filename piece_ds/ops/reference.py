"""The pure torch meaning of every op: the provider of last resort and the oracle of the compiled ones.

Numerics are defined to the bit, so that every provider and every device can agree: fp32, each operation rounded to
nearest once (product, then sum: no fused multiply-add), no flushing of denormals.
"""

import torch
from torch import Tensor

from piece_ds.ops.schema import NAMESPACE

# Elements per temporary: 512 KiB in fp32 stays in a core's cache; 2**17 was the best of 2**16 .. 2**20 on a CPU.
CHUNK = 1 << 17


def accumulate_(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor, scale: float, num_nonfinite: Tensor) -> None:
    for start in range(0, grad.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        value = _finite(grad[part], num_nonfinite)
        if scale != 1.0:
            value = value * scale
        if grad_sum is not None:
            grad_sum[part].add_(value)
        square_sum[part].add_(value * value)


def _finite(value: Tensor, num_nonfinite: Tensor) -> Tensor:
    """value in fp32 with NaN and infinities counted and zeroed; it may be value itself, which is not written."""
    # On the CPU, where looking at a result costs nothing, one reduction spares three passes in the usual case.
    if value.device.type == "cpu" and torch.isfinite(torch.stack(torch.aminmax(value))).all():
        return value.to(torch.float32)
    finite = torch.isfinite(value)
    num_nonfinite += value.numel() - finite.sum()
    return value.to(torch.float32, copy=True).masked_fill_(~finite, 0.0)


def score(grad_sum: Tensor | None, square_sum: Tensor, lam: float) -> Tensor:
    if grad_sum is None:
        result = square_sum.clone()
    else:
        result = grad_sum.abs().div_(_sqrt_rn_(square_sum + lam))
    # NaN (inf / inf after an overflow of the sums) ranks last; adding 0 turns -0 into +0.
    return result.nan_to_num_(nan=0.0, posinf=float("inf")).add_(0.0)


def _sqrt_rn_(x: Tensor) -> Tensor:
    """Square root, correctly rounded. torch's CPU sqrt goes through a vector library that is 1 ulp off at times."""
    if x.device.type != "cpu":
        return x.sqrt_()
    import numpy as np

    array = x.numpy()
    np.sqrt(array, out=array)
    return x


def digit_histogram_(counts: Tensor, score: Tensor, shift: int, bits: int, prefix: int) -> None:
    key = score.view(torch.int32)  # order-preserving for non-negative floats
    if shift + bits < 31:
        key = key[(key >> (shift + bits)) == prefix]
    digit = (key >> shift) & ((1 << bits) - 1)
    counts += torch.bincount(digit, minlength=1 << bits)


def index_to_mask(index: Tensor, n: int) -> Tensor:
    bits = torch.zeros((n + 7) // 8, dtype=torch.uint8, device=index.device)
    one = torch.ones_like(index, dtype=torch.uint8)
    # Each element has a bit of its own, so adding is or-ing.
    return bits.index_add_(0, index >> 3, torch.bitwise_left_shift(one, (index & 7).to(torch.uint8)))


def mask_to_index(bits: Tensor) -> Tensor:
    byte = bits.nonzero().squeeze(1)  # few bytes have a bit at 0.1 %: expand only those
    position = torch.arange(8, dtype=torch.uint8, device=bits.device)
    is_set = (bits[byte].unsqueeze(1) >> position) & 1
    return (byte.unsqueeze(1) * 8 + position.to(torch.int64))[is_set.bool()]


def apply_mask_(grad: Tensor, index: Tensor) -> None:
    kept = grad[index]
    grad.zero_()
    grad[index] = kept


for _name in ("accumulate_", "score", "digit_histogram_", "index_to_mask", "mask_to_index", "apply_mask_"):
    torch.library.impl(f"{NAMESPACE}::{_name}", ["cpu", "cuda"], globals()[_name])
