"""Apply weight decay only to selected elements: hide it from the base optimizer during its step, and do it here.

Adam leaves an element alone if its gradient and moments are zero. Its weight decay would not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piece_ds.zero.adapter import Adapter, positions_in


class SelectedDecay:
    """Decoupled weight decay of chosen elements of an engine's masters, with each optimizer group's own rate."""

    def __init__(self, adapter: Adapter, index: dict[str, Tensor] | None) -> None:
        """Find the decaying elements; install() makes them decay.

        Args:
            adapter: of the engine.
            index: name of a parameter that DeepSpeed optimises -> ascending flat positions that decay; None means that
                everything decays.
        """
        self._masters = adapter.masters()  # keeps the ids in use
        self._positions: dict[int, Tensor] = {}
        if index is not None:
            self._positions = {id(master): positions_in(pieces, index) for master, pieces in self._masters}
        self._all = index is None
        self._rates: list[float] = []

    def install(self, optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
        """Act in every step of the base optimizer; return functions that remove the hooks."""
        return [
            optimizer.register_step_pre_hook(self._before_step).remove,
            optimizer.register_step_post_hook(self._after_step).remove,
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Decay selected masters, then hide weight_decay from the optimizer's own update of all masters."""
        for group in optimizer.param_groups:
            factor = 1.0 - float(group["lr"]) * group["weight_decay"]
            for master in group["params"]:
                if factor != 1.0:
                    self._decay_(master, factor)
        self._rates = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Restore weight_decay, so that checkpoints and schedulers see the true one."""
        for group, weight_decay in zip(optimizer.param_groups, self._rates, strict=True):
            group["weight_decay"] = weight_decay

    def _decay_(self, master: Tensor, factor: float) -> None:
        if self._all:
            master.data.mul_(factor)
            return

        # Positions begin on the CPU and are moved once to the master's device.
        positions = self._positions[id(master)]
        if positions.device != master.device:
            positions = self._positions[id(master)] = positions.to(master.device)
        flat = master.data.view(-1)
        flat[positions] = flat[positions] * factor
