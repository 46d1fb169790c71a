"""Between the two forms of a mask: ascending positions, the working form, and packed bits, the form in files."""

import torch
from torch import Tensor

from piece_ds.ops.backends import load_for


def index_to_mask(index: Tensor, n: int) -> Tensor:
    """Packed bits (uint8, ceil(n / 8)) with ones at index (int64, unique, in [0, n)); padding bits are zero."""
    load_for(index)
    return torch.ops.piece_ds.index_to_mask(index, n)


def mask_to_index(bits: Tensor) -> Tensor:
    """Return ascending positions (int64) of the ones in packed bits (uint8)."""
    load_for(bits)
    return torch.ops.piece_ds.mask_to_index(bits)
