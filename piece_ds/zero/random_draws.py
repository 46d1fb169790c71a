"""Find models whose loss is random without dropout too: statistics of their gradients would hold the noise.

Random attention (BigBird), random hashes (Reformer) and layers of a model's own draw numbers that no setting switches
off. A draw alone is no harm: layers that may be dropped draw a number for a rate of 0 as well.
"""

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from piece_ds.runtime.distributed import all_reduce_max_, collective_device
from piece_ds.runtime.errors import UserError


class DrawWatch:
    """Tells whether a random number was drawn since the watch was made, by Python, NumPy or torch."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._before = self._states()

    def drew(self) -> bool:
        """Return whether a number was drawn on this rank. Cost: copies of states of a few KB."""
        return self._states() != self._before

    def _states(self) -> tuple[Any, ...]:
        states: list[Any] = [random.getstate(), pickle.dumps(np.random.get_state())]
        states.append(torch.get_rng_state().numpy().tobytes())
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device).numpy().tobytes())
        return tuple(states)


def any_rank(flag: bool) -> bool:
    """Return whether flag is true on any rank. A collective."""
    return bool(all_reduce_max_(torch.tensor(int(flag), dtype=torch.int32, device=collective_device())))


def refuse_random_loss(engine: Any, first: Tensor, second: Tensor, forward: Callable[[], Any]) -> None:
    """Raise UserError on every rank if two losses of one micro-batch differ on any. A collective.

    Args:
        engine: of the model, in the mode of the statistics pass.
        first, second: losses, of one forward pass each.
        forward: runs another forward pass, to name the module that draws.
    """
    # Operations without a deterministic form make losses differ too.
    if engine.device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        return
    first, second = first.detach(), second.detach()
    if any_rank(not torch.equal(first, second)):
        raise UserError(
            f"the loss of {type(engine.module).__name__} changes from one forward pass to the next without dropout "
            f"(here {float(first):.6g} and {float(second):.6g}): {_drawing_module(engine, forward)} draws random "
            "numbers, which the statistics of a mask would hold; use a method without statistics, such as magnitude, "
            "random or seqft"
        )


def _drawing_module(engine: Any, forward: Callable[[], Any]) -> str:
    """Return the kind of the innermost module in whose forward pass a number is drawn."""
    found: list[str] = []
    watches: dict[nn.Module, DrawWatch] = {}

    def before(module: nn.Module, _: Any) -> None:
        watches[module] = DrawWatch(engine.device)

    def after(module: nn.Module, *_: Any) -> None:
        if module in watches and watches.pop(module).drew():
            found.append(type(module).__name__)

    # The first to end is an innermost one. Every rank runs the pass, since ZeRO-3 gathers weights in it.
    handles = []
    for module in engine.module.modules():
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "its code"
