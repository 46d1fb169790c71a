"""What a file's checksum and a model's fingerprint are made of."""

import hashlib
import json

import torch
from torch import Tensor, nn

from piece_ds.distributed import all_reduce_sum_
from piece_ds.state.mask import Mask, collective_device
from piece_ds.state.partition import Layout
from piece_ds.zero.weights import read_weight

# Elements whose int64 hashes are alive at a time: 128 MiB.
HASHED_ELEMENTS = 1 << 23

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood 2014), as signed integers.
_GAMMA, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def model_fingerprint(layout: Layout) -> str:
    """sha256 of every parameter's name and shape, in order: equal for equal architectures, whatever the weights."""
    structure = [[info.name, list(info.shape)] for info in layout.parameters]
    return hashlib.sha256(json.dumps(structure).encode()).hexdigest()


def weights_fingerprint(model: nn.Module, mask: Mask) -> Tensor:
    """64 bits (int64, one element, CPU) of all weights outside mask, the same for any number of ranks. A collective.

    The sum modulo 2**64 of a hash of (position in the model, bits) over the elements, so that ranks add their shares
    and the selected elements can be subtracted. It tells models apart; it does not withstand an attacker.

    Cost: reads this rank's share of the weights once.
    """
    params = dict(model.named_parameters())
    total = torch.zeros(1, dtype=torch.int64)
    offset = 0
    for info in mask.layout.parameters:
        part = mask.layout.partition(info)
        weight = read_weight(params[info.name], part.start, part.numel)
        bits = weight.view(_BITS[weight.element_size()])
        for begin in range(0, part.numel, HASHED_ELEMENTS):
            piece = bits[begin : begin + HASHED_ELEMENTS]
            positions = torch.arange(piece.numel(), device=piece.device) + (offset + part.start + begin)
            total += _hash(positions, piece).sum().cpu()
        if info.name in mask.index:
            index = mask.index[info.name].to(bits.device)
            total -= _hash(index + offset, bits[index - part.start]).sum().cpu()
        offset += info.numel
    return all_reduce_sum_(total.to(collective_device())).cpu()


def _hash(positions: Tensor, bits: Tensor) -> Tensor:
    """SplitMix64's finalizer of position and bits; int64 arithmetic wraps around."""
    mixed = positions * _GAMMA + bits.long()
    mixed = (mixed ^ ((mixed >> 30) & ((1 << 34) - 1))) * _MIX_1
    mixed = (mixed ^ ((mixed >> 27) & ((1 << 37) - 1))) * _MIX_2
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bytes of CPU tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
