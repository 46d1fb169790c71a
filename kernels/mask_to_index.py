"""mask_to_index: packed bits to ascending positions. Count per block, prefix by torch, write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import positions_of_block
from piece_ds.kernels.launch import BLOCK, OPTIONS, grid, num_blocks, require_vector


@triton.jit
def load_flags(bits_ptr, n_bytes, BLOCK: tl.constexpr):
    """(positions of this program's bytes, their 8 flags each as int32 [BLOCK, 8]); zeros beyond the end."""
    byte, mask = positions_of_block(n_bytes, BLOCK)
    bits = tl.load(bits_ptr + byte, mask=mask, other=0).to(tl.int32)
    return byte, (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1


@triton.jit
def _mask_to_index_count_kernel(bits_ptr, counts_ptr, n_bytes, BLOCK: tl.constexpr):
    _, flag = load_flags(bits_ptr, n_bytes, BLOCK)
    tl.store(counts_ptr + tl.program_id(0), tl.sum(tl.sum(flag, axis=1)).to(tl.int64))


@triton.jit
def _mask_to_index_write_kernel(bits_ptr, before_ptr, out_ptr, n_bytes, BLOCK: tl.constexpr):
    first, end = tl.load(before_ptr + tl.program_id(0)), tl.load(before_ptr + tl.program_id(0) + 1)
    if end > first:
        byte, flag = load_flags(bits_ptr, n_bytes, BLOCK)
        in_byte = tl.sum(flag, axis=1)
        before = first + tl.cumsum(in_byte) - in_byte
        place = before[:, None] + tl.cumsum(flag, axis=1) - flag
        position = byte[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(out_ptr + place, position, mask=flag > 0)


def mask_to_index(bits: Tensor) -> Tensor:
    """See piece_ds.ops.mask_to_index."""
    n = bits.numel()
    require_vector("bits", bits, n, torch.uint8)
    if n == 0:
        return bits.new_empty(0, dtype=torch.int64)
    # Entry b + 1 counts block b, so that the prefix sums of the blocks' counts begin with 0.
    before = bits.new_zeros(num_blocks(n) + 1, dtype=torch.int64)
    _mask_to_index_count_kernel[grid(n)](bits, before[1:], n, BLOCK, **OPTIONS)
    before = before.cumsum(0)
    out = bits.new_empty(int(before[-1]), dtype=torch.int64)
    if out.numel() > 0:
        _mask_to_index_write_kernel[grid(n)](bits, before, out, n, BLOCK, **OPTIONS)
    return out
