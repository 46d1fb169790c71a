"""apply_mask_: put the selected entries aside, zero the gradient, put them back; the norm comes with the first step."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import from_float, is_finite, load_position, positions_of_block, to_float
from piece_ds.kernels.launch import BLOCK, CHECKED_OPTIONS, DTYPES, OPTIONS, grid, num_blocks, require_vector


@triton.jit
def _apply_mask_keep_kernel(
    grad_ptr,
    index_ptr,
    scale,
    kept_ptr,
    partial_ptr,
    num_nonfinite_ptr,
    limit,
    n_elements,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j, mask = positions_of_block(n_elements, BLOCK)
    position, inside = load_position(index_ptr, j, mask, limit)
    value = tl.load(grad_ptr + position, mask=inside, other=0.0)
    if SCALED:
        value = from_float(to_float(value) * scale, value.dtype)
    tl.store(kept_ptr + j, value, mask=mask)
    x = to_float(value)
    num_bad = tl.sum((is_finite(x) == 0).to(tl.int32))
    tl.atomic_add(num_nonfinite_ptr, num_bad.to(tl.int64), mask=num_bad > 0, sem="relaxed")
    tl.store(partial_ptr + tl.program_id(0), tl.sum(x.to(tl.float64) * x.to(tl.float64)))


@triton.jit
def _apply_mask_scatter_kernel(grad_ptr, index_ptr, kept_ptr, n_elements, BLOCK: tl.constexpr):
    j, mask = positions_of_block(n_elements, BLOCK)
    position = tl.load(index_ptr + j, mask=mask, other=0)
    tl.store(grad_ptr + position, tl.load(kept_ptr + j, mask=mask), mask=mask)


def apply_mask_(grad: Tensor, index: Tensor, scale: float, square_norm: Tensor, num_nonfinite: Tensor) -> None:
    """See piece_ds.ops.apply_mask_."""
    n, k = grad.numel(), index.numel()
    require_vector("grad", grad, n, *DTYPES)
    require_vector("index", index, k, torch.int64)
    require_vector("square_norm", square_norm, 1, torch.float64)
    require_vector("num_nonfinite", num_nonfinite, 1, torch.int64)
    if k == 0:
        grad.zero_()
        return
    kept = grad.new_empty(k)
    partial = grad.new_empty(num_blocks(k), dtype=torch.float64)
    _apply_mask_keep_kernel[grid(k)](
        grad, index, scale, kept, partial, num_nonfinite, n, k, scale != 1.0, BLOCK, **CHECKED_OPTIONS
    )
    square_norm += partial.sum()
    grad.zero_()
    _apply_mask_scatter_kernel[grid(k)](grad, index, kept, k, BLOCK, **OPTIONS)
