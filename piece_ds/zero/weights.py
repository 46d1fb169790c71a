"""Read and write a parameter's elements, wherever ZeRO keeps them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piece_ds import ops
from piece_ds.runtime.distributed import all_reduce_sum_
from piece_ds.state.mask import Mask, collective_device, gather_fragments
from piece_ds.state.partition import index_dtype, is_partitioned
from piece_ds.state.weights_hash import bits_of, hash_elements, hash_range


def read_weight(param: nn.Parameter, start: int, numel: int) -> Tensor:
    """Return elements [start, start + numel) of a parameter, in its dtype. A view or a copy: do not write it.

    Args:
        param: whole, or partitioned by ZeRO-3.
        start, numel: flat range; under ZeRO-3 it must lie in the range this rank owns.
    Raises:
        RuntimeError: under ZeRO-3, the range is not held on this rank.
    """
    if not is_partitioned(param):
        return param.detach().reshape(-1)[start : start + numel]
    shard, chunk = param.ds_tensor, param.partition_numel()
    offset = start - chunk * dist.get_rank(group=param.ds_process_group)
    if offset < 0 or offset + numel > shard.numel():
        raise RuntimeError(
            f"elements [{start}, {start + numel}) of a parameter of {param.ds_numel} elements are not "
            f"in this rank's shard of {shard.numel()}: read them on their owner"
        )
    return shard.detach().reshape(-1)[offset : offset + numel]


def read_whole(param: nn.Parameter, device: torch.device) -> Tensor:
    """Return all elements of a parameter on every rank, on device. 1-D under ZeRO-3, else as it is. A collective.

    Cost: under ZeRO-3, one all-gather of the parameter, without changing DeepSpeed's record of what is gathered.
    """
    if not is_partitioned(param):
        return param.detach()
    shard = param.ds_tensor.detach().to(device)
    num_ranks = dist.get_world_size(group=param.ds_process_group)
    whole = torch.empty(shard.numel() * num_ranks, dtype=shard.dtype, device=device)
    bits = torch.float16 if shard.dtype == torch.bfloat16 else shard.dtype  # gloo knows no bf16; only bits are moved
    dist.all_gather(list(whole.view(bits).chunk(num_ranks)), shard.view(bits), group=param.ds_process_group)
    return whole[: param.ds_numel]


def forget_secondary(model: nn.Module) -> None:
    """Drop the secondary shards of hierarchical partitioning (hpZ), after the primary ones were overwritten.

    DeepSpeed makes them again at the next gather. By itself it drops only those of parameters it optimises.
    """
    for param in model.parameters():
        if getattr(param, "ds_secondary_tensor", None) is not None:
            param.ds_secondary_tensor = None


class SelectedWeights:
    """Selected elements of one parameter, in every copy that this rank holds of them.

    Under ZeRO-3 there may be three copies: the shard, the gathered parameter if it is resident (small ones stay so),
    and the secondary shard of hierarchical partitioning. DeepSpeed never renews the last for a parameter it does not
    optimise.

    Attributes:
        param: whole, or partitioned by ZeRO-3.
        index: ascending flat positions of the selected elements in the whole parameter (CPU).
    """

    def __init__(self, param: nn.Parameter, index: Tensor) -> None:
        self.param, self.index = param, index
        self._ranges: dict[tuple[int, int, torch.device], tuple[int, int, Tensor]] = {}

    def read(self, whole: Tensor) -> Tensor:
        """Return the selected elements of a tensor of the whole parameter's shape, such as its gradient; 1-D."""
        return whole.reshape(-1)[self._inside(0, whole.numel(), whole.device)[2]]

    def write_(self, values: Tensor) -> None:
        """Set the selected elements, in the order of index."""
        for flat, start in self._copies():
            low, high, where = self._inside(start, flat.numel(), flat.device)
            flat[where] = values[low:high].to(flat.device)

    def held_range(self) -> tuple[int, int]:
        """Return (first, past the last) of the selected elements that this rank owns: all of them without ZeRO-3."""
        flat, start = next(self._copies())
        return self._inside(start, flat.numel(), flat.device)[:2]

    def read_held(self) -> Tensor:
        """Return the values of those elements, in the parameter's dtype, on its device."""
        flat, start = next(self._copies())
        return flat[self._inside(start, flat.numel(), flat.device)[2]]

    def _copies(self) -> Iterator[tuple[Tensor, int]]:
        """Yield (flat tensor, position of its first element in the whole parameter) for every copy."""
        param = self.param
        if not is_partitioned(param):
            yield param.data.view(-1), 0
            return

        # ZeRO-3: the shard, the gathered parameter, and hpZ's secondary shard.
        yield param.ds_tensor.data.view(-1), param.partition_numel() * dist.get_rank(group=param.ds_process_group)
        if param.ds_status.name == "AVAILABLE":
            yield param.data.view(-1), 0
        secondary = param.ds_secondary_tensor
        if secondary is not None:
            yield secondary.data.view(-1), secondary.numel() * dist.get_rank(group=param.ds_zero_param_process_group)

    def _inside(self, start: int, numel: int, device: torch.device) -> tuple[int, int, Tensor]:
        """Return (first, past the last, positions counted from start) of the selected elements in a range.

        The range is [start, start + numel). The positions are found once and kept on the device, in 4 or 8 bytes an
        element, so a step does not wait for the host.
        """
        key = (start, numel, device)
        if key not in self._ranges:
            low, high = torch.searchsorted(self.index, torch.tensor([start, start + numel])).tolist()
            self._ranges[key] = low, high, (self.index[low:high] - start).to(device, index_dtype(numel))
        return self._ranges[key]


class SelectedWeightList:
    """Selected elements of many parameters, in every copy that this rank holds, written in one call a dtype."""

    def __init__(self, weights: Iterable[SelectedWeights]) -> None:
        self.weights = list(weights)
        self._plans: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}

    def write_(self, values_K: Tensor) -> None:
        """Set the selected elements of all parameters, in order.

        Args:
            values_K: values of the first parameter first; 1-D.
        Cost: one scatter for the copies of a dtype on a device. The host waits for nothing once their places are known.
        """
        # Group the copies, since one kernel call takes one dtype on one device.
        copies: dict[tuple[torch.device, torch.dtype], list[tuple[SelectedWeights, Tensor, int, int]]] = {}
        first = 0
        for weight in self.weights:
            for flat, start in weight._copies():
                copies.setdefault((flat.device, flat.dtype), []).append((weight, flat, start, first))
            first += weight.index.numel()

        # Write each group.
        for (device, dtype), places in copies.items():
            index, source = self._plan(places, values_K.numel(), device)
            values = values_K if source is None else values_K[source.to(values_K.device)]
            values = values.to(device, dtype).contiguous()
            ops.scatter_list_([flat for _, flat, _, _ in places], index, values)

    def _plan(
        self, places: list[tuple[SelectedWeights, Tensor, int, int]], num_values: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return (positions in the concatenated copies, which values go there; None means all of them in order).

        Found once for each set of copies. It takes 8 bytes an element on the device, or 16 if not all values go there.
        """
        key = (device, *((start, flat.numel(), first) for _, flat, start, first in places))
        if key not in self._plans:
            begin, index, source = 0, [], []
            for weight, flat, start, first in places:
                low, high, where = weight._inside(start, flat.numel(), torch.device("cpu"))
                index.append(where.to(torch.int64) + begin)
                source.append(torch.arange(first + low, first + high))
                begin += flat.numel()
            all_values, positions = torch.cat(source), torch.cat(index)
            is_all = torch.equal(all_values, torch.arange(num_values))
            self._plans[key] = positions.to(device), None if is_all else all_values.to(device)
        return self._plans[key]


def read_selected(model: nn.Module, mask: Mask) -> dict[str, Tensor]:
    """Return copies of the selected weights that this rank owns: name -> values on the CPU in the parameter's dtype."""
    params = dict(model.named_parameters())
    values = {}
    for info in mask.layout.parameters:
        if info.name in mask.index:
            part = mask.layout.partition(info)
            weight = read_weight(params[info.name], part.start, part.numel)
            index = (mask.index[info.name] - part.start).to(weight.device)
            values[info.name] = weight[index].cpu()
    return values


def write_selected_(model: nn.Module, mask: Mask, values: dict[str, Tensor]) -> None:
    """Set the selected weights, in every copy that a rank holds, to what read_selected() returned. A collective."""
    params = dict(model.named_parameters())
    index = mask.whole()
    whole = gather_fragments(mask.layout, values, {name: param.dtype for name, param in params.items()})
    with torch.no_grad():
        for name, positions in index.items():
            SelectedWeights(params[name], positions).write_(whole[name])
    forget_secondary(model)


def weights_fingerprint(model: nn.Module, mask: Mask) -> Tensor:
    """Return the sum of the hashes of all weights outside mask (int64, one element, CPU). A collective.

    It is the same for any number of ranks.

    Cost: reads this rank's share of the weights once; 8 bytes of communication.
    """
    params = dict(model.named_parameters())
    total = 0
    for info in mask.layout.parameters:
        part = mask.layout.partition(info)
        if part.numel == 0:  # its start may lie outside of what ZeRO-3 keeps here
            continue

        # Hash the whole range, then take the selected elements out again.
        bits = bits_of(read_weight(params[info.name], part.start, part.numel))
        total += hash_range(info.name, bits, part.start)
        if info.name in mask.index:
            index = mask.index[info.name].to(bits.device)
            total -= hash_elements(info.name, index, bits[index - part.start])

    # Python's sum is unbounded: bring it into int64, as the all-reduce wraps too.
    signed = (total + 2**63) % 2**64 - 2**63
    return all_reduce_sum_(torch.tensor([signed], device=collective_device())).cpu()
