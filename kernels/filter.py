"""filter_: append the elements whose score reaches a bound, in one read of the sums."""

import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import append, load_score, positions_of_block
from piece_ds.kernels.launch import BLOCK, OPTIONS, grid, require_candidates, require_sums


# Numbers that change from call to call must not cause a new compilation.
@triton.jit(do_not_specialize=["offset", "capacity"])
def _filter_kernel(
    sum_ptr,
    square_ptr,
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
    score = load_score(sum_ptr, square_ptr, lam, position, mask, WITH_SUM)
    found = mask & (score >= bound)
    append(found, score, position + offset, candidate_score_ptr, candidate_index_ptr, num_candidates_ptr, capacity)


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
    """Append candidates; see piece_ds.ops.filter_."""
    require_sums(grad_sum, square_sum)
    require_candidates(candidate_score, candidate_index, num_candidates)
    n = square_sum.numel()
    if n > 0:
        _filter_kernel[grid(n)](
            grad_sum,
            square_sum,
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
