"""Scale what a task without a mask has changed: every trained weight, in memory, to any alpha and back to the bit."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piece_ds.deltas.delta import Change
from piece_ds.deltas.scale import scaled_values
from piece_ds.state.partition import is_partitioned
from piece_ds.zero.weights import forget_secondary, read_whole


class DenseChange:
    """Whole parameters before and after a task. Make it before training, call end() after it, then set_() at will.

    Cost: two copies, on the CPU, of what this rank holds of the parameters: all of them, or its shard under ZeRO-3.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        """Copy the parameters as they are now.

        Args:
            model: before the task; whole, or partitioned by ZeRO-3.
            names: of the parameters that the task changes.
        """
        params = dict(model.named_parameters())
        self._model = model
        self._params = {name: params[name] for name in names}
        self._before = {name: _held(param).cpu().clone() for name, param in self._params.items()}
        self._after: dict[str, Tensor] = {}

    def end(self) -> None:
        """Copy the parameters as the task has left them."""
        self._after = {name: _held(param).cpu().clone() for name, param in self._params.items()}
        for name, param in self._params.items():
            # Adapters are made whole; ZeRO-3 partitions them when the engine is made.
            if self._before[name].shape != self._after[name].shape:
                self._before[name] = _shard(self._before[name], param)
            # PEFT makes adapters in fp32; the engine rounds them to the dtype that they train in.
            self._before[name] = self._before[name].to(self._after[name].dtype)

    @torch.no_grad()
    def set_(self, alpha: float = 1.0) -> None:
        """Write before + alpha * (after - before) into every parameter. A collective.

        Args:
            alpha: 0 gives the weights before the task, 1 those after it.
        """
        nowhere = torch.zeros(0, dtype=torch.int64)
        for name, param in self._params.items():
            change = Change(nowhere, self._after[name], self._before[name])
            _held(param).copy_(scaled_values(change, alpha))

            # ZeRO-3 keeps small parameters gathered beside their shards.
            if is_partitioned(param) and param.ds_status.name == "AVAILABLE":
                param.data.view(-1).copy_(read_whole(param, param.device))
        forget_secondary(self._model)


def _held(param: nn.Parameter) -> Tensor:
    """Return what this rank holds of a parameter, flat, to be written to."""
    return param.ds_tensor.data.view(-1) if is_partitioned(param) else param.data.view(-1)


def _shard(whole: Tensor, param: nn.Parameter) -> Tensor:
    """Return this rank's shard of a flat whole parameter, padded as ZeRO-3 pads it."""
    chunk = param.ds_tensor.numel()
    begin = chunk * dist.get_rank(group=param.ds_process_group)
    own = whole[begin : begin + chunk]
    return torch.cat([own, own.new_zeros(chunk - own.numel())])
