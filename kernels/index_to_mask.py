"""index_to_mask: positions to packed bits, with integer atomics on 32-bit words."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import load_position, positions_of_block
from piece_ds.kernels.launch import BLOCK, CHECKED_OPTIONS, grid, num_blocks, require_vector


@triton.jit(do_not_specialize=["limit"])
def _index_to_mask_kernel(index_ptr, words_ptr, limit, n_elements, BLOCK: tl.constexpr):
    j, mask = positions_of_block(n_elements, BLOCK)
    position, inside = load_position(index_ptr, j, mask, limit)
    # Little-endian: bit i % 32 of word i / 32 is bit i % 8 of byte i / 8.
    bit = tl.full([BLOCK], 1, tl.int32) << (position & 31).to(tl.int32)
    tl.atomic_or(words_ptr + (position >> 5), bit, mask=inside, sem="relaxed")


def index_to_mask(index: Tensor, n: int) -> Tensor:
    """Return packed bits of positions; see piece_ds.ops.index_to_mask."""
    k = index.numel()
    require_vector("index", index, k, torch.int64)
    words = index.new_zeros(num_blocks(n, 32), dtype=torch.int32)
    if k > 0:
        _index_to_mask_kernel[grid(k)](index, words, n, k, BLOCK, **CHECKED_OPTIONS)
    return words.view(torch.uint8)[: num_blocks(n, 8)]
