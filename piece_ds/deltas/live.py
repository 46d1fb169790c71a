"""Put a delta on a model in memory: one write per element, any alpha, and back to the bit."""

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
    """Changes and the model that they are written into. set_() may be called any number of times."""

    def __init__(self, model: nn.Module, changes: Mapping[str, Change]) -> None:
        """Find where each change is written in what this process holds.

        Args:
            model: on any device, in any dtype; whole, partitioned by ZeRO-3, or with DTensor parameters. Each rank
                writes what it holds.
            changes: parameter name -> its whole change, the same on every rank.
        """
        self.model = model
        params = dict(model.named_parameters())
        self._writers = [(change, _writer(params[name], change.index)) for name, change in changes.items()]

    @classmethod
    def of(cls, model: nn.Module, delta: Delta) -> "LiveDelta":
        """Return a delta file's changes on model.

        Raise UserError unless the model has its parameters, in the same shapes.
        """
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
        """Write previous + alpha * (value - previous) at every selected element, whatever the model holds there now.

        Args:
            alpha: 0 gives the base, 1 the task.
        Raises:
            ValueError: alpha is not 1 and the delta has no previous values.
        """
        values = [scaled_values(change, alpha) for change, _ in self._writers]  # all, before anything is written
        for (_, write), new in zip(self._writers, values, strict=True):
            write(new)
        forget_secondary(self.model)


def apply_delta_(model: nn.Module, delta_file: Path | str, alpha: float = 1.0) -> LiveDelta:
    """Put a delta file on a model in memory, with its changes multiplied by alpha.

    Positions and values are absolute. So a second call with another alpha is exact, 0 and 1 included. The model must be
    the one that the delta was made on, at that point of its stack. Only names and shapes are compared.

    Args:
        model: see LiveDelta.
        delta_file: path of the delta.
        alpha: factor of the changes.
    Returns:
        An object that sets another alpha without reading the file again.
    Raises:
        UserError: the file is damaged, or of another model.
    Cost: reads the file twice, then one write per element.
    """
    live = LiveDelta.of(model, open_delta(delta_file))
    live.set_(alpha)
    return live


def _writer(param: nn.Parameter, index: Tensor) -> Callable[[Tensor], None]:
    """Return a function that writes values, in the order of index, into what this process holds of a parameter."""
    if isinstance(param.data, DTensor):
        return _dtensor_writer(param.data, index)
    selected = SelectedWeights(param, index)
    return lambda values: selected.write_(values.to(param.dtype))


def _dtensor_writer(whole: DTensor, index: Tensor) -> Callable[[Tensor], None]:
    """Return the same for a DTensor: this rank writes into its block.

    The block is found by its offset and size in every dimension.
    """
    local = whole.to_local()
    chunks = whole.__create_chunk_list__()
    # A rank that holds nothing has nothing to write; several blocks are not supported.
    if len(chunks) != 1 or tuple(chunks[0].sizes) != tuple(local.shape) or local.numel() == 0:
        if local.numel() == 0:
            return lambda values: None
        raise UserError(f"a DTensor with placements {whole.placements} is not one block here: gather it first")
    places = torch.unravel_index(index, whole.shape)
    inside = torch.ones(index.numel(), dtype=torch.bool)
    flat = torch.zeros_like(index)
    for place, offset, size in zip(places, chunks[0].offsets, local.shape, strict=True):
        inside &= (place >= offset) & (place < offset + size)
        # Row-major position inside the block.
        flat = flat * size + (place - offset)
    own = inside.nonzero().view(-1)
    target = flat[own].to(local.device)

    def write(values: Tensor) -> None:
        if not local.is_contiguous():
            local[torch.unravel_index(target, local.shape)] = values[own].to(local.device, local.dtype)
        else:
            local.view(-1)[target] = values[own].to(local.device, local.dtype)

    return write
