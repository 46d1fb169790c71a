"""select_above: ascending positions of the scores above a key, and of the first ties with it.

Count per block, add up over the blocks, write. A scan across programs inside one kernel would make them wait for each
other, so the sums over blocks are torch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import load_score, positions_of_block
from piece_ds.kernels.launch import BLOCK, OPTIONS, grid, num_blocks, require, require_sums


@triton.jit
def compare_keys(sum_ptr, square_ptr, lam, key, position, mask, WITH_SUM: tl.constexpr):
    """Return 1 where the element's key is greater than key, and 1 where it is equal; int32."""
    # Scores are 0 or more, so their bits order as they do.
    own = load_score(sum_ptr, square_ptr, lam, position, mask, WITH_SUM).to(tl.int32, bitcast=True)
    return (mask & (own > key)).to(tl.int32), (mask & (own == key)).to(tl.int32)


@triton.jit(do_not_specialize=["key"])
def _select_above_count_kernel(
    sum_ptr, square_ptr, lam, key, above_ptr, ties_ptr, n_elements, WITH_SUM: tl.constexpr, BLOCK: tl.constexpr
):
    position, mask = positions_of_block(n_elements, BLOCK)
    is_above, is_tie = compare_keys(sum_ptr, square_ptr, lam, key, position, mask, WITH_SUM)
    tl.store(above_ptr + tl.program_id(0), tl.sum(is_above).to(tl.int64))
    tl.store(ties_ptr + tl.program_id(0), tl.sum(is_tie).to(tl.int64))


@triton.jit(do_not_specialize=["num_ties", "key"])
def _select_above_write_kernel(
    sum_ptr,
    square_ptr,
    lam,
    key,
    num_ties,
    above_ptr,
    ties_ptr,
    out_ptr,
    n_elements,
    WITH_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # How many elements are found before this block, and before the next one.
    above, above_end = tl.load(above_ptr + tl.program_id(0)), tl.load(above_ptr + tl.program_id(0) + 1)
    ties, ties_end = tl.load(ties_ptr + tl.program_id(0)), tl.load(ties_ptr + tl.program_id(0) + 1)
    # Most blocks hold nothing that is selected: do not read them again.
    if (above_end > above) | ((ties_end > ties) & (ties < num_ties)):
        position, mask = positions_of_block(n_elements, BLOCK)
        is_above, is_tie = compare_keys(sum_ptr, square_ptr, lam, key, position, mask, WITH_SUM)
        above_before = above + tl.cumsum(is_above) - is_above
        ties_before = ties + tl.cumsum(is_tie) - is_tie
        # Positions written before this one: all above the key, and as many ties as were wanted.
        place = above_before + tl.where(ties_before < num_ties, ties_before, num_ties)
        tl.store(out_ptr + place, position, mask=(is_above > 0) | ((is_tie > 0) & (ties_before < num_ties)))


def select_above(grad_sum: Tensor | None, square_sum: Tensor, lam: float, key: int, num_ties: int) -> Tensor:
    """Return the selected positions; see piece_ds.ops.select_above."""
    require_sums(grad_sum, square_sum)
    require(
        0 <= key < 1 << 31 and num_ties >= 0,
        f"select_above expected 0 <= key < 2^31 and num_ties >= 0, got key {key}, num_ties {num_ties}",
    )
    n = square_sum.numel()
    if n == 0:
        return square_sum.new_empty(0, dtype=torch.int64)
    # Entry b + 1 counts block b, so that the prefix sums begin with 0.
    before = square_sum.new_zeros(2, num_blocks(n) + 1, dtype=torch.int64)
    common, with_sum = (grad_sum, square_sum, lam, key), grad_sum is not None
    _select_above_count_kernel[grid(n)](*common, before[0, 1:], before[1, 1:], n, with_sum, BLOCK, **OPTIONS)
    before = before.cumsum(1)
    num_above, all_ties = before[:, -1].tolist()
    out = square_sum.new_empty(num_above + min(all_ties, num_ties), dtype=torch.int64)
    if out.numel() > 0:
        _select_above_write_kernel[grid(n)](*common, num_ties, before[0], before[1], out, n, with_sum, BLOCK, **OPTIONS)
    return out
