"""Convert between the two forms of a mask: ascending positions in memory, packed bits in files."""

import torch
from torch import Tensor

from piece_ds.ops.backends import load_for


def index_to_mask(index: Tensor, n: int) -> Tensor:
    """Return packed bits (uint8, ceil(n / 8)) with ones at index. Padding bits are zero.

    Args:
        index: int64, unique, in [0, n).
        n: number of elements.
    """
    load_for(index)
    return torch.ops.piece_ds.index_to_mask(index, n)


def mask_to_index(bits: Tensor) -> Tensor:
    """Return ascending positions (int64) of the ones in packed bits (uint8)."""
    load_for(bits)
    return torch.ops.piece_ds.mask_to_index(bits)
