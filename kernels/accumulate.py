"""accumulate_: add a gradient to both sums. One read of the gradient, one read and write of each sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import is_finite, positions_of_block, to_float
from piece_ds.kernels.launch import BLOCK, DTYPES, OPTIONS, grid, require_sums, require_vector


@triton.jit
def add_gradient(grad_ptr, sum_ptr, square_ptr, scale, num_nonfinite_ptr, position, mask, WITH_SUM: tl.constexpr):
    """Add a gradient at position to the sums; return the new (sum, square sum).

    Non-finite entries count as 0 and are counted in num_nonfinite_ptr.
    """
    grad = to_float(tl.load(grad_ptr + position, mask=mask, other=0.0))
    finite = is_finite(grad)
    # One atomic per program, and none if all entries are finite.
    num_bad = tl.sum((finite == 0).to(tl.int32))
    tl.atomic_add(num_nonfinite_ptr, num_bad.to(tl.int64), mask=num_bad > 0, sem="relaxed")
    grad = tl.where(finite, grad, 0.0) * scale
    # The square is that of the scaled gradient.
    square = tl.load(square_ptr + position, mask=mask, other=0.0) + grad * grad
    tl.store(square_ptr + position, square, mask=mask)
    if WITH_SUM:
        total = tl.load(sum_ptr + position, mask=mask, other=0.0) + grad
        tl.store(sum_ptr + position, total, mask=mask)
    else:
        total = square
    return total, square


@triton.jit
def _accumulate_kernel(
    grad_ptr,
    sum_ptr,
    square_ptr,
    scale,
    num_nonfinite_ptr,
    n_elements,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position, mask = positions_of_block(n_elements, BLOCK)
    add_gradient(grad_ptr, sum_ptr, square_ptr, scale, num_nonfinite_ptr, position, mask, WITH_SUM)


def accumulate_(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor, scale: float, num_nonfinite: Tensor) -> None:
    """Add a gradient to both sums; see piece_ds.ops.accumulate_."""
    n = grad.numel()
    grad = check_accumulate(grad, grad_sum, square_sum, num_nonfinite)
    if n > 0:
        _accumulate_kernel[grid(n)](
            grad, grad_sum, square_sum, scale, num_nonfinite, n, grad_sum is not None, BLOCK, **OPTIONS
        )


def check_accumulate(grad: Tensor, grad_sum: Tensor | None, square_sum: Tensor, num_nonfinite: Tensor) -> Tensor:
    """Check the arguments; return the gradient, contiguous. It is only read."""
    grad = grad.contiguous()
    require_vector("grad", grad, square_sum.numel(), *DTYPES)
    require_sums(grad_sum, square_sum)
    require_vector("num_nonfinite", num_nonfinite, 1, torch.int64)
    return grad
