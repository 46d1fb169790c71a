"""accumulate_filter_: accumulate_, then filter_ of the new sums while they are still in registers."""

import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.accumulate import add_gradient, check_accumulate
from piece_ds.kernels.elements import append, positions_of_block, score_of
from piece_ds.kernels.launch import BLOCK, OPTIONS, grid, require_candidates


@triton.jit(do_not_specialize=["offset", "capacity"])
def _accumulate_filter_kernel(
    grad_ptr,
    sum_ptr,
    square_ptr,
    scale,
    num_nonfinite_ptr,
    lam,
    bound,
    offset,
    candidate_score_ptr,
    candidate_index_ptr,
    num_candidates_ptr,
    capacity,
    n_elements,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position, mask = positions_of_block(n_elements, BLOCK)
    total, square = add_gradient(grad_ptr, sum_ptr, square_ptr, scale, num_nonfinite_ptr, position, mask, WITH_SUM)
    # The sums are in registers: scoring them costs no further read.
    score = score_of(total, square, lam, WITH_SUM)
    found = mask & (score >= bound)
    append(found, score, position + offset, candidate_score_ptr, candidate_index_ptr, num_candidates_ptr, capacity)


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
    """Add a gradient to both sums and append candidates; see piece_ds.ops.accumulate_filter_."""
    n = grad.numel()
    grad = check_accumulate(grad, grad_sum, square_sum, num_nonfinite)
    require_candidates(candidate_score, candidate_index, num_candidates)
    if n > 0:
        _accumulate_filter_kernel[grid(n)](
            grad,
            grad_sum,
            square_sum,
            scale,
            num_nonfinite,
            lam,
            bound,
            offset,
            candidate_score,
            candidate_index,
            num_candidates,
            candidate_score.numel(),
            n,
            grad_sum is not None,
            BLOCK,
            **OPTIONS,
        )
