"""Put a delta on a model in memory: one write per element, any alpha, and back to the bit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from piece_ds.deltas.delta import Change, Delta, open_delta
from piece_ds.deltas.held import Held
from piece_ds.deltas.scale import scaled_values
from piece_ds.runtime.errors import UserError
from piece_ds.zero.weights import forget_secondary


class LiveDelta:
    """Changes and the model that they are written into. set_() may be called any number of times.

    Attributes:
        model: the model.
        held: (parameter name, change, what this process holds of it) for every parameter that changes.
    """

    def __init__(self, model: nn.Module, changes: Mapping[str, Change]) -> None:
        """Find where each change is written in what this process holds.

        Args:
            model: on any device, in any dtype; whole, partitioned by ZeRO-3, or with DTensor parameters. Each rank
                writes what it holds.
            changes: parameter name -> its whole change, the same on every rank.
        """
        self.model = model
        params = dict(model.named_parameters())
        self.held = [(name, change, Held(params[name], change.index)) for name, change in changes.items()]

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
        return cls(model, dict(delta.changes()))

    @torch.no_grad()
    def set_(self, alpha: float = 1.0) -> None:
        """Write previous + alpha * (value - previous) at every selected element, whatever the model holds there now.

        Args:
            alpha: 0 gives the base, 1 the task.
        Raises:
            ValueError: alpha is not 1 and the delta has no previous values.
        """
        values = [scaled_values(change, alpha) for _, change, _ in self.held]  # all, before anything is written
        for (_, _, held), new in zip(self.held, values, strict=True):
            held.write_(new)
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
    Cost: reads the file once, then one write per element.
    """
    live = LiveDelta.of(model, open_delta(delta_file, hold=True))
    live.set_(alpha)
    return live
