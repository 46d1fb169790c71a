"""What this process holds of a parameter of a live model, whichever way it is sharded, and who holds the rest.

A parameter may be whole, partitioned by ZeRO-3, or a DTensor. Each process reads and writes its own elements. Sums over
the whole parameter add up what the ranks of its groups hold; ranks that hold copies are in no group with each other.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import is_partitioned
from piece_ds.state.weights_hash import bits_of, hash_elements, hash_range
from piece_ds.zero.weights import SelectedWeights

# Elements of a DTensor's block whose positions are computed at a time: 8 bytes each.
_CHUNK = 1 << 22

Groups = tuple[dist.ProcessGroup, ...]


@dataclass(frozen=True)
class _Block:
    """The one block of a DTensor that this process holds.

    Attributes:
        local: its elements.
        shape: of the whole tensor.
        offsets: of the block in every dimension.
    """

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


class Held:
    """Chosen elements of one parameter, as far as this process holds them.

    Attributes:
        index: flat positions of all of them in the whole parameter.
        own: places in the chosen elements' order that are held here; CPU, int64.
    """

    def __init__(self, param: nn.Parameter, index: Tensor) -> None:
        """Find the elements.

        Args:
            param: on any device, in any dtype.
            index: ascending flat positions in the whole parameter; CPU, int64.
        Raises:
            UserError: a DTensor is here in several blocks.
        """
        self._param, self.index = param, index
        self._selected: SelectedWeights | None = None
        self._block: _Block | None = None
        self._places: tuple[Tensor, ...] = ()
        if not isinstance(param.data, DTensor):
            self._selected = SelectedWeights(param, index)
            self.own = torch.arange(*self._selected.held_range())
            return

        # A DTensor: the chosen elements inside the block, by their place in every dimension.
        self.own = torch.zeros(0, dtype=torch.int64)
        self._block = _block_of(param.data)
        if self._block is None:
            return
        inside = torch.ones(index.numel(), dtype=torch.bool)
        places = torch.unravel_index(index, self._block.shape)
        for place, offset, size in zip(places, self._block.offsets, self._block.local.shape, strict=True):
            inside &= (place >= offset) & (place < offset + size)
        self.own = inside.nonzero().view(-1)
        device = self._block.local.device
        self._places = tuple(
            (place[self.own] - offset).to(device) for place, offset in zip(places, self._block.offsets, strict=True)
        )

    def read(self) -> Tensor:
        """Return the values at own, in the parameter's dtype, on the CPU."""
        if self._selected is not None:
            return self._selected.read_held().cpu()
        return self._block.local[self._places].cpu() if self._block is not None else self._nothing()

    def write_(self, values: Tensor) -> None:
        """Set the chosen elements in every copy that this process holds.

        Args:
            values: of all of them, in order; cast to the parameter's dtype.
        """
        if self._selected is not None:
            self._selected.write_(values.to(self._param.dtype))
        elif self._block is not None:
            local = self._block.local
            local[self._places] = values[self.own].to(local.device, local.dtype)

    def _nothing(self) -> Tensor:
        return torch.zeros(0, dtype=self._param.dtype)


def groups_of(param: nn.Parameter) -> Groups:
    """Return the process groups over which the parts of a parameter are spread; empty if it is whole here."""
    if isinstance(param.data, DTensor):
        mesh, placements = param.data.device_mesh, param.data.placements
        return tuple(mesh.get_group(dim) for dim, placed in enumerate(placements) if not placed.is_replicate())
    return (param.ds_process_group,) if is_partitioned(param) else ()


def hash_held(name: str, param: nn.Parameter) -> int:
    """Return the sum of the hashes of what this process holds of a parameter, in [0, 2**64).

    Cost: reads it once.
    """
    if isinstance(param.data, DTensor):
        block = _block_of(param.data)
        return sum(_hashes(name, block)) % 2**64 if block is not None else 0
    if not is_partitioned(param):
        return hash_range(name, bits_of(param.detach().reshape(-1)))
    start = param.partition_numel() * dist.get_rank(group=param.ds_process_group)
    flat = param.ds_tensor.detach().reshape(-1)[: max(0, param.ds_numel - start)]  # the last shard is padded
    return hash_range(name, bits_of(flat), start) if flat.numel() else 0


def _block_of(whole: DTensor) -> _Block | None:
    """Return this process's block; None if it holds nothing. Raise UserError if there are several."""
    local = whole.to_local()
    if local.numel() == 0:
        return None
    chunks = whole.__create_chunk_list__()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape):
        raise UserError(f"a DTensor with placements {whole.placements} is not one block here: gather it first")
    return _Block(local, tuple(whole.shape), tuple(chunks[0].offsets))


def _hashes(name: str, block: _Block) -> Iterator[int]:
    """Yield the hashes of a block's elements, some at a time, by their positions in the whole tensor."""
    flat = block.local.detach().reshape(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        bits = bits_of(flat[begin : begin + _CHUNK])
        inner = torch.arange(begin, begin + bits.numel(), device=bits.device)
        position = torch.zeros_like(inner)
        for place, offset, size in zip(
            torch.unravel_index(inner, block.local.shape), block.offsets, block.shape, strict=True
        ):
            position = position * size + place + offset
        yield hash_elements(name, position, bits)
