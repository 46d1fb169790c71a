"""Masked update mode: the engine hook that zeroes unselected entries of the reduced gradient before the step.

With gradient and moments zero, Adam leaves an entry alone; weight decay would not, so it is taken out of the base
optimizer for the duration of its step and applied to selected masters only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from piece_ds.state.mask import Mask
from piece_ds.zero import open_door, require_trainable
from piece_ds.zero.pieces import positions_in


class MaskedUpdate:
    """A mask installed on one engine. `detach()` removes every hook."""

    def __init__(self, engine: Any, mask: Mask) -> None:
        require_trainable(engine)
        adapter = open_door(engine)
        whole = mask.whole()
        adapter.prepare()
        adapter.bind(whole)
        self.mask = mask
        self._optimizer = engine.basic_optimizer
        self._selected = {id(master): positions_in(pieces, whole) for master, pieces in adapter.masters()}
        self._masters = adapter.masters()  # keeps the ids in use
        self._decay: list[float] = []
        self._remove: list[Callable[[], None]] = [
            adapter.install(adapter.mask_gradients_),
            self._optimizer.register_step_pre_hook(self._before_step).remove,
            self._optimizer.register_step_post_hook(self._after_step).remove,
        ]

    def detach(self) -> None:
        """Leave the engine as it was before."""
        for remove in self._remove:
            remove()
        self._remove = []

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Decay selected masters, then hide weight_decay from the optimizer's own update of all of them."""
        for group in optimizer.param_groups:
            factor = 1.0 - float(group["lr"]) * group["weight_decay"]
            for master in group["params"]:
                if factor != 1.0:
                    self._decay_(master, factor)
        self._decay = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Checkpoints and schedulers keep seeing the true weight decay."""
        for group, weight_decay in zip(optimizer.param_groups, self._decay, strict=True):
            group["weight_decay"] = weight_decay

    def _decay_(self, master: Tensor, factor: float) -> None:
        positions = self._selected[id(master)]
        if positions.device != master.device:
            positions = self._selected[id(master)] = positions.to(master.device)
        flat = master.data.view(-1)
        flat[positions] = flat[positions] * factor


def attach(engine: Any, mask: Mask) -> MaskedUpdate:
    """From now on engine.step() trains only the selected weights; every other weight keeps its bits.

    Works at ZeRO 0-3 with and without CPU offload, in fp32, bf16 and (stage 1-3) fp16. The mask acts before
    DeepSpeed's overflow check, norm and clipping, so engine.get_global_grad_norm() is the norm of the masked gradient.
    A collective: every rank calls it, once per engine and before the first step.

    Args:
        engine: deepspeed.DeepSpeedEngine.
        mask: from select() or load_mask(), of this model and this number of ranks.
    Raises:
        UserError: the engine uses a feature or an optimizer with which this has not been proven to be exact.
    Cost per step: one pass over the reduced gradient. Memory: 8 bytes per selected element that this rank updates.
    """
    return MaskedUpdate(engine, mask)
