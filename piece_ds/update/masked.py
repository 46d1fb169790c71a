"""Masked update mode: the engine hook that zeroes unselected entries of the reduced gradient before the step."""

from typing import Any

from piece_ds.state.mask import Mask
from piece_ds.update.decay import SelectedDecay
from piece_ds.zero import open_door, require_trainable


class MaskedUpdate:
    """A mask installed on one engine. `detach()` removes every hook."""

    def __init__(self, engine: Any, mask: Mask) -> None:
        require_trainable(engine)
        adapter = open_door(engine)
        whole = mask.whole()
        if engine.global_steps == 0:  # else masters and moments are those of a checkpoint
            adapter.prepare()
        adapter.bind(whole)
        self.mask = mask
        decay = SelectedDecay(adapter, whole)
        self._remove = [adapter.install_mask(), *decay.install(engine.basic_optimizer)]

    def detach(self) -> None:
        """Leave the engine as it was before."""
        for remove in self._remove:
            remove()
        self._remove = []
