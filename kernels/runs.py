"""A list of tensors as one range of positions: a table of its runs of memory, and a search in the table.

Tensors that lie side by side in one storage are one run. So the parts of a flat buffer are as good as one tensor.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.launch import DTYPES, require, require_vector


@triton.jit
def place_of(position, mask, begins_ptr, addresses_ptr, num_runs, total, ELEMENT: tl.constexpr, STEPS: tl.constexpr):
    """Return pointers to positions of the list, and which of the positions exist.

    The run is found by bisection; STEPS is the number of bits of num_runs - 1.
    """
    inside = (position >= 0) & (position < total)
    tl.device_assert(inside, "piece_ds: a position in index lies outside of its tensor", mask=mask)
    inside = mask & inside
    run = tl.zeros_like(position)
    # Bisect for the last run that begins at or before the position.
    for step in tl.static_range(STEPS):
        later = run + (1 << (STEPS - 1 - step))
        begin = tl.load(begins_ptr + later, mask=inside & (later < num_runs), other=0)
        run = tl.where((later < num_runs) & (begin <= position), later, run)
    begin = tl.load(begins_ptr + run, mask=inside, other=0)
    address = tl.load(addresses_ptr + run, mask=inside, other=0)
    place = address + (position - begin) * (ELEMENT.primitive_bitwidth // 8)
    return place.to(tl.pointer_type(ELEMENT)), inside


class Runs(NamedTuple):
    """The table that place_of() needs.

    Attributes:
        begins, addresses: int64, on the tensors' device: first position and address of each run.
        num_runs, total: runs, and elements; positions are in [0, total).
        steps: bits of num_runs - 1.
        flat: the list as one tensor, if it is one run; else None.
    """

    begins: Tensor
    addresses: Tensor
    num_runs: int
    total: int
    steps: int
    flat: Tensor | None


def runs_of(name: str, tensors: Sequence[Tensor], device: torch.device) -> Runs:
    """Return the table of tensors, on device. The host does not wait for the copy.

    Args:
        name: of the list, for messages.
        tensors: contiguous, of one dtype, all on device.
        device: of the table.
    Raises:
        RuntimeError: a tensor is not contiguous, or not of the common dtype or device.
    """
    runs: list[tuple[int, int]] = []
    total, end, storage = 0, -1, -1
    kept = [tensor for tensor in tensors if tensor.numel()]
    for tensor in kept:
        require_vector(name, tensor, tensor.numel(), *DTYPES)
        require(tensor.dtype == kept[0].dtype, f"the tensors of {name} must have one dtype: call once for each")
        require(tensor.device == device, f"{name} must be on {device}")
        # A neighbour by chance in another storage is no part of the run.
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage:
            runs.append((total, tensor.data_ptr()))
        total += tensor.numel()
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        storage = tensor.untyped_storage().data_ptr()

    # Pinned memory lets the copy run beside the host.
    table = torch.tensor(list(zip(*runs, strict=True)) or [(), ()], dtype=torch.int64, pin_memory=device.type == "cuda")
    begins, addresses = table.to(device, non_blocking=True)
    flat = kept[0].as_strided((total,), (1,)) if len(runs) == 1 else None
    return Runs(begins, addresses, len(runs), total, max(0, len(runs) - 1).bit_length(), flat)
