"""score_histogram_: counts of one digit of the keys.

Up to 11 bits a program counts many blocks in a table of its own and adds it to the result once. A wider table does not
fit a program's registers: every element then is one atomic on device memory, which is slow where few digits are common.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import load_score
from piece_ds.kernels.launch import BLOCK, OPTIONS, num_blocks, require, require_sums, require_vector

MAX_PRIVATE_BITS = 11
# 16 programs on each of 132 multiprocessors; each adds its table to the result once.
MAX_PROGRAMS = 2112


@triton.jit
def _score_histogram_kernel(
    sum_ptr,
    square_ptr,
    counts_ptr,
    lam,
    shift,
    bits,
    prefix,
    run,
    stride,
    num_sampled,
    num_steps,
    WITH_SUM: tl.constexpr,
    LEADING: tl.constexpr,
    SAMPLING: tl.constexpr,
    NUM_PRIVATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    num_bins = tl.full([], 1, tl.int32) << bits
    if NUM_PRIVATE > 0:
        table = tl.zeros([NUM_PRIVATE], dtype=tl.int32)
    for step in range(num_steps):
        block = tl.program_id(0).to(tl.int64) + step * tl.num_programs(0).to(tl.int64)
        position = block * BLOCK + tl.arange(0, BLOCK)
        mask = position < num_sampled
        if SAMPLING:
            position = position // run * stride + position % run
        key = load_score(sum_ptr, square_ptr, lam, position, mask, WITH_SUM).to(tl.int32, bitcast=True)
        if not LEADING:
            mask = mask & ((key >> (shift + bits)) == prefix)
        digit = (key >> shift) & (num_bins - 1)
        if NUM_PRIVATE > 0:
            table += tl.histogram(digit, NUM_PRIVATE, mask=mask)
        else:
            tl.atomic_add(counts_ptr + digit, tl.full([BLOCK], 1, tl.int64), mask=mask, sem="relaxed")
    if NUM_PRIVATE > 0:
        bin = tl.arange(0, NUM_PRIVATE)
        tl.atomic_add(counts_ptr + bin, table.to(tl.int64), mask=(bin < num_bins) & (table > 0), sem="relaxed")


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
    """See piece_ds.ops.score_histogram_."""
    require(
        0 <= bits <= 16 and shift >= 0 and shift + bits <= 31,
        f"score_histogram_ expected 0 <= bits <= 16, shift >= 0 and shift + bits <= 31, got shift {shift}, bits {bits}",
    )
    require(
        run >= 1 and stride >= 1,
        f"score_histogram_ expected run >= 1 and stride >= 1, got run {run}, stride {stride}",
    )
    require_sums(grad_sum, square_sum)
    require_vector("counts", counts, 1 << bits, torch.int64)
    n = square_sum.numel()
    if run < stride:
        n = n // stride * run + min(n % stride, run)
    if n == 0:
        return
    num_programs = min(num_blocks(n), MAX_PROGRAMS)
    _score_histogram_kernel[(num_programs,)](
        grad_sum,
        square_sum,
        counts,
        lam,
        shift,
        bits,
        prefix,
        run,
        stride,
        n,
        num_blocks(num_blocks(n), num_programs),
        grad_sum is not None,
        shift + bits == 31,
        run < stride,
        1 << MAX_PRIVATE_BITS if bits <= MAX_PRIVATE_BITS else 0,
        BLOCK,
        **OPTIONS,
    )
