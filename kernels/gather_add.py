"""gather_add_: add the selected entries of a gradient to a list."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import load_position, positions_of_block, to_float
from piece_ds.kernels.launch import BLOCK, CHECKED_OPTIONS, DTYPES, grid, require_vector


@triton.jit(do_not_specialize=["limit"])
def _gather_add_kernel(grad_ptr, index_ptr, scale, total_ptr, limit, n_elements, BLOCK: tl.constexpr):
    j, mask = positions_of_block(n_elements, BLOCK)
    position, inside = load_position(index_ptr, j, mask, limit)
    value = to_float(tl.load(grad_ptr + position, mask=inside, other=0.0))
    tl.store(total_ptr + j, tl.load(total_ptr + j, mask=mask, other=0.0) + value * scale, mask=mask)


def gather_add_(grad: Tensor, index: Tensor, scale: float, total: Tensor) -> None:
    """Add the selected entries of a gradient to total; see piece_ds.ops.gather_add_."""
    n, k = grad.numel(), index.numel()
    # Only read, so a copy is allowed.
    grad = grad.contiguous()
    require_vector("grad", grad, n, *DTYPES)
    require_vector("index", index, k, torch.int64)
    require_vector("total", total, k, torch.float32)
    if k > 0:
        _gather_add_kernel[grid(k)](grad, index, scale, total, n, k, BLOCK, **CHECKED_OPTIONS)
