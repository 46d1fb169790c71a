"""A delta on a model in memory: as many writes as it has elements, any alpha, and back to the bit."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from piece_ds.deltas.delta import Change, Delta, open_delta
from piece_ds.deltas.scale import scaled_values
from piece_ds.runtime.errors import UserError
from piece_ds.zero.weights import SelectedWeights, forget_secondary


class LiveDelta:
    """Changes and the model they are put on; set_() may be called again and again."""

    def __init__(self, model: nn.Module, changes: Mapping[str, Change]) -> None:
        """
        Args:
            model: on any device, of any dtype; whole, partitioned by ZeRO-3, or with DTensor parameters (each rank
                writes what it holds).
            changes: parameter name -> its whole change, the same on every rank.
        """
        self.model = model
        params = dict(model.named_parameters())
        self._writers = [(change, _writer(params[name], change.index)) for name, change in changes.items()]

    @classmethod
    def of(cls, model: nn.Module, delta: Delta) -> "LiveDelta":
        """Return a delta file's. Raises UserError unless the model has its parameters, of the same shapes."""
        params = dict(model.named_parameters())
        for name, shape in delta.shapes.items():
            if name not in params:
                raise UserError(f"delta {delta.path} changes {name!r}, which this model does not have")
            param = params[name]
            found = tuple(getattr(param, "ds_shape", param.shape))
            if found != shape:
                raise UserError(
                    f"delta {delta.path} changes {name!r} of shape {list(shape)}, this model's is {list(found)}"
                )
        return cls(model, {name: delta.change(name) for name in delta.shapes})

    @torch.no_grad()
    def set_(self, alpha: float = 1.0) -> None:
        """Write previous + alpha * (value - previous) at every selected element, whatever stands there now.

        Raises:
            ValueError: alpha is not 1 and the delta has no previous values.
        """
        values = [scaled_values(change, alpha) for change, _ in self._writers]  # all, before anything is written
        for (_, write), new in zip(self._writers, values, strict=True):
            write(new)
        forget_secondary(self.model)


def apply_delta_(model: nn.Module, delta_file: Path | str, alpha: float = 1.0) -> LiveDelta:
    """Put a delta file on a model in memory, its changes multiplied by alpha.

    Positions and values are absolute: calling it again with another alpha, 0 and 1 included, is exact. The model must
    be the one the delta was made on, at that point of its stack; only names and shapes are compared.

    Returns:
        What sets another alpha without reading the file again.
    Raises:
        UserError: the file is damaged, or of another model.
    Cost: reads the file twice, then one write per element.
    """
    live = LiveDelta.of(model, open_delta(delta_file))
    live.set_(alpha)
    return live


def _writer(param: nn.Parameter, index: Tensor) -> Callable[[Tensor], None]:
    """What writes values, in the order of index, into what this process holds of a parameter."""
    if isinstance(param.data, DTensor):
        return _dtensor_writer(param.data, index)
    selected = SelectedWeights(param, index)
    return lambda values: selected.write_(values.to(param.dtype))


def _dtensor_writer(whole: DTensor, index: Tensor) -> Callable[[Tensor], None]:
    """As _writer(): this rank's block of the tensor, found by its offset and size in every dimension."""
    local = whole.to_local()
    chunks = whole.__create_chunk_list__()
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape) or local.numel() == 0:
        if local.numel() == 0:
            return lambda values: None
        raise UserError(f"a DTensor with placements {whole.placements} is not one block here: gather it first")
    places = torch.unravel_index(index, whole.shape)
    inside = torch.ones(index.numel(), dtype=torch.bool)
    flat = torch.zeros_like(index)
    for place, offset, size in zip(places, chunks[0].offsets, local.shape, strict=True):
        inside &= (place >= offset) & (place < offset + size)
        flat = flat * size + (place - offset)
    own = inside.nonzero().view(-1)
    target = flat[own].to(local.device)

    def write(values: Tensor) -> None:
        if not local.is_contiguous():
            local[torch.unravel_index(target, local.shape)] = values[own].to(local.device, local.dtype)
        else:
            local.view(-1)[target] = values[own].to(local.device, local.dtype)

    return write
