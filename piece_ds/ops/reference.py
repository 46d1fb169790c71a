"""Define every op in pure torch: the oracle of the compiled providers, and a provider if it is asked for.

Numerics are defined to the bit, so that every provider and every device can agree: fp32, each operation rounded to
nearest once (product, then sum: no fused multiply-add), IEEE square root and division, no flushing of denormals.
Scalars are computed in fp64 and rounded to fp32 once. Two things are left open, within what their docstrings say: the
order of candidates, and the order of additions in square_norm and sampled_gradient_.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from piece_ds.ops.schema import NAMESPACE, SCHEMAS

# Elements per temporary: 512 KiB in fp32 stays in a core's cache; 2**17 was the best of 2**16 .. 2**20 on a CPU.
CHUNK = 1 << 17


def accumulate_(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor, scale: float, num_nonfinite: Tensor) -> None:
    """Add grad * scale and its square to the sums, with non-finite entries counted and taken as 0."""
    for start in range(0, grad.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        value = _finite(grad[part], num_nonfinite)
        if scale != 1.0:
            value = value * scale
        if grad_sum is not None:
            grad_sum[part].add_(value)
        square_sum[part].add_(value * value)


def _finite(value: Tensor, num_nonfinite: Tensor) -> Tensor:
    """Return value in fp32 with NaN and infinities counted and zeroed. It may be value itself, which is not written."""
    # On the CPU a result is read without waiting, so one reduction saves three passes in the usual case.
    if value.device.type == "cpu" and torch.isfinite(torch.stack(torch.aminmax(value))).all():
        return value.to(torch.float32)
    finite = torch.isfinite(value)
    num_nonfinite += value.numel() - finite.sum()
    return value.to(torch.float32, copy=True).masked_fill_(~finite, 0.0)


def accumulate_filter_(
    grad: Tensor,
    grad_sum: Tensor | None,
    square_sum: Tensor,
    scale: float,
    num_nonfinite: Tensor,
    lam: float,
    bound: float,
    offset: int,
    candidate_score: Tensor,
    candidate_index: Tensor,
    num_candidates: Tensor,
) -> None:
    """Add the gradient as accumulate_() does, then filter the new sums."""
    accumulate_(grad, grad_sum, square_sum, scale, num_nonfinite)
    filter_(grad_sum, square_sum, lam, bound, offset, candidate_score, candidate_index, num_candidates)


def score(grad_sum: Tensor | None, square_sum: Tensor, lam: float) -> Tensor:
    """Return |grad_sum| / sqrt(square_sum + lam), or a copy of square_sum if grad_sum is None."""
    if grad_sum is None:
        result = square_sum.clone()
    else:
        result = grad_sum.abs().div_(_sqrt_rn_(square_sum + lam))
    # NaN (inf / inf after an overflow of the sums) ranks last; adding 0 turns -0 into +0.
    return result.nan_to_num_(nan=0.0, posinf=float("inf")).add_(0.0)


def _sqrt_rn_(x: Tensor) -> Tensor:
    """Replace x by its correctly rounded square root and return it.

    torch's CPU sqrt goes through a vector library that is sometimes off by 1 ulp.
    """
    if x.device.type != "cpu":
        return x.sqrt_()
    import numpy as np

    array = x.numpy()
    np.sqrt(array, out=array)
    return x


def _chunks(grad_sum: Tensor | None, square_sum: Tensor, lam: float) -> Iterator[tuple[int, Tensor]]:
    """Yield (position of the first element, scores) of every chunk."""
    for start in range(0, square_sum.numel(), CHUNK):
        part = slice(start, start + CHUNK)
        yield start, score(None if grad_sum is None else grad_sum[part], square_sum[part], lam)


def score_histogram_(
    counts: Tensor,
    grad_sum: Tensor | None,
    square_sum: Tensor,
    lam: float,
    shift: int,
    bits: int,
    prefix: int,
    run: int,
    stride: int,
) -> None:
    """Count the digits of the sampled keys that start with prefix."""
    for start, scores in _chunks(grad_sum, square_sum, lam):
        key = scores.view(torch.int32)  # order-preserving for non-negative floats

        # Keep the sample, then the keys with this prefix.
        if run < stride:
            position = torch.arange(start, start + key.numel(), device=key.device)
            key = key[position % stride < run]
        if shift + bits < 31:
            key = key[(key >> (shift + bits)) == prefix]
        digit = (key >> shift) & ((1 << bits) - 1)
        counts += torch.bincount(digit, minlength=1 << bits)


def filter_(
    grad_sum: Tensor | None,
    square_sum: Tensor,
    lam: float,
    bound: float,
    offset: int,
    candidate_score: Tensor,
    candidate_index: Tensor,
    num_candidates: Tensor,
) -> None:
    """Append every element with score >= bound, in ascending order, and count also those without room."""
    for start, scores in _chunks(grad_sum, square_sum, lam):
        found = (scores >= bound).nonzero().squeeze(1)
        first = int(num_candidates)

        # What has no room is counted, so that the caller can tell.
        room = found[: max(0, candidate_score.numel() - first)]
        candidate_score[first : first + room.numel()] = scores[room]
        candidate_index[first : first + room.numel()] = room + (offset + start)
        num_candidates += found.numel()


def select_above(grad_sum: Tensor | None, square_sum: Tensor, lam: float, key: int, num_ties: int) -> Tensor:
    """Return ascending positions of greater keys, and of the first num_ties keys that are equal."""
    selected = [torch.zeros(0, dtype=torch.int64, device=square_sum.device)]
    for start, scores in _chunks(grad_sum, square_sum, lam):
        keys = scores.view(torch.int32)

        # Ties are taken in ascending order until their number is used up.
        ties = (keys == key).nonzero().squeeze(1)[:num_ties]
        num_ties -= ties.numel()
        above = (keys > key).nonzero().squeeze(1)
        selected.append(torch.cat([above, ties]).sort().values + start)
    return torch.cat(selected)


def index_to_mask(index: Tensor, n: int) -> Tensor:
    """Return packed bits with ones at index; bit j of byte i is element 8 i + j."""
    bits = torch.zeros((n + 7) // 8, dtype=torch.uint8, device=index.device)
    one = torch.ones_like(index, dtype=torch.uint8)
    # Each element has a bit of its own, so adding is or-ing.
    return bits.index_add_(0, index >> 3, torch.bitwise_left_shift(one, (index & 7).to(torch.uint8)))


def mask_to_index(bits: Tensor) -> Tensor:
    """Return ascending positions of the ones in packed bits."""
    byte = bits.nonzero().squeeze(1)  # few bytes have a bit at 0.1 %: expand only those
    position = torch.arange(8, dtype=torch.uint8, device=bits.device)
    is_set = (bits[byte].unsqueeze(1) >> position) & 1
    return (byte.unsqueeze(1) * 8 + position.to(torch.int64))[is_set.bool()]


def apply_mask_(
    grad: Tensor, index: Tensor, scale: float, square_norm: Tensor | None, num_nonfinite: Tensor | None
) -> None:
    """Zero grad outside index and multiply it by scale inside."""
    kept = grad[index]
    if scale != 1.0:
        kept = (kept.to(torch.float32) * scale).to(grad.dtype)

    # Norm and finite check read only what is kept, as written.
    if square_norm is not None:
        square_norm += kept.to(torch.float64).square().sum()
    if num_nonfinite is not None:
        num_nonfinite += kept.numel() - torch.isfinite(kept).sum()
    grad.zero_()
    grad[index] = kept


def apply_mask_list_(
    grads: list[Tensor], index: Tensor, scale: float, square_norm: Tensor | None, num_nonfinite: Tensor | None
) -> None:
    """Mask each of grads by its part of index."""
    for grad, position, _ in _each(grads, index):
        apply_mask_(grad, position, scale, square_norm, num_nonfinite)


def scatter_list_(weights: list[Tensor], index: Tensor, values: Tensor) -> None:
    """Write values at index into the concatenation of weights."""
    for weight, position, part in _each(weights, index):
        weight[position] = values[part]


def _each(tensors: list[Tensor], index: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Yield (tensor, positions in it, which of index they are) for ascending positions in the concatenation of tensors.

    Raises:
        IndexError: a position is outside the concatenation.
    """
    begin = low = 0
    for tensor in tensors:
        end = begin + tensor.numel()
        high = int(torch.searchsorted(index, end))
        yield tensor, index[low:high] - begin, slice(low, high)
        begin, low = end, high
    if low < index.numel() or (low > 0 and int(index[0]) < 0):
        raise IndexError(f"index holds a position outside [0, {begin})")


def gather_add_(grad: Tensor, index: Tensor, scale: float, total: Tensor) -> None:
    """Add grad[index] * scale to total."""
    total += grad[index].to(torch.float32) * scale


def sampled_gradient_(grad_output: Tensor, input: Tensor, index: Tensor, scale: float, total: Tensor) -> None:
    """Add the entries of grad_output^T input at index, times scale, to total."""
    num_tokens, width = input.shape
    # Entries at a time: two gathered blocks of CHUNK elements.
    step = max(1, CHUNK // max(1, num_tokens))
    for start in range(0, index.numel(), step):
        part = index[start : start + step]
        rows = grad_output[:, part // width].to(torch.float32)
        columns = input[:, part % width].to(torch.float32)
        total[start : start + step] += (rows * columns).sum(0) * scale


def sparse_adamw_(
    grad: Tensor,
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    index: Tensor,
    grad_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    weight_holds_value: bool,
) -> None:
    """Take one AdamW step of value, and write it to weight[index] in the weight's dtype."""
    # Decay and moments.
    before = value.to(weight.dtype, copy=True)
    g = grad * grad_scale
    value.mul_(1.0 - lr * weight_decay)
    exp_avg.add_((g - exp_avg) * (1.0 - beta1))
    exp_avg_sq.mul_(beta2).add_((g * g) * (1.0 - beta2))
    # Multiplied by the inverse: torch's own division by a number is one on a CPU and a product on a GPU.
    step_size, correction = lr / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
    denominator = _sqrt_rn_(exp_avg_sq.clone()) * correction + eps
    value.sub_((exp_avg / denominator) * step_size)

    # Write the weights; only those whose bits change, if the weight is known to hold the old value.
    after = value.to(weight.dtype)
    if weight_holds_value:
        changed = _bits(after) != _bits(before)
        index, after = index[changed], after[changed]
    weight[index] = after


def sparse_adamw_list_(
    grad: Tensor,
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: list[Tensor],
    index: Tensor,
    grad_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    weight_holds_value: bool,
) -> None:
    """Take one AdamW step for each of weights, with its part of the values and of index."""
    numbers = (grad_scale, lr, beta1, beta2, eps, weight_decay, step, weight_holds_value)
    for weight, position, part in _each(weights, index):
        sparse_adamw_(grad[part], value[part], exp_avg[part], exp_avg_sq[part], weight, position, *numbers)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.itemsize == 4 else torch.int16)


def register(device_type: str) -> None:
    """Register these functions as the kernels of device_type ('cpu', 'cuda')."""
    for name in SCHEMAS:
        torch.library.impl(f"{NAMESPACE}::{name}", device_type, globals()[name])
