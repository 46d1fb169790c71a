"""Masked update mode: a hook on the engine zeroes unselected entries of the reduced gradient before the step."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from piece_ds.runtime.errors import UserError
from piece_ds.runtime.overriding import override
from piece_ds.state.mask import Mask
from piece_ds.update.decay import SelectedDecay
from piece_ds.update.step_scale import StepScale
from piece_ds.zero.even_gradients import even_out_gradients
from piece_ds.zero.partial_gradients import refuse_parts
from piece_ds.zero.scaled_update import scale_selected
from piece_ds.zero.selected_state import (
    SelectedState,
    count_moments_elsewhere,
    read_selected_state,
    write_selected_state_,
)
from piece_ds.zero.step_watch import StepWatch
from piece_ds.zero.supported import adapter_for, require_trainable
from piece_ds.zero.weights import SelectedWeights, forget_secondary


class MaskedUpdate:
    """A mask installed on one engine. `detach()` removes every hook.

    Attributes:
        mask: in force.
        watch: of the engine's steps; one with a NaN or infinite gradient is skipped.
    """

    def __init__(self, engine: Any, mask: Mask, step_scale: StepScale | None = None) -> None:
        # Check the engine, and bring its masters and moments to the weights.
        require_trainable(engine)
        self._engine, self._adapter = engine, adapter_for(engine)
        adapter = self._adapter
        whole = mask.whole()
        if engine.global_steps == 0:  # else masters and moments are those of a checkpoint
            adapter.prepare()
        else:
            self._refuse_moments_elsewhere(whole, "the engine's optimizer has")

        # Find the selection in this rank's gradients and masters.
        adapter.bind(whole)
        self.mask, self._whole = mask, whole
        decay = SelectedDecay(adapter, whole)

        # Hooks around the step. The first one runs last before a step, so the watch sees the masked gradient.
        self.watch = StepWatch(adapter)
        self._remove = [*self.watch.install(), adapter.install_mask(), *decay.install(engine.basic_optimizer)]
        if step_scale is not None:
            scale = scale_selected(adapter, whole, step_scale.selected(mask))
            self._remove += scale.install(engine.basic_optimizer)
        self._remove += [refuse_parts(engine), even_out_gradients(engine), self._check_checkpoints()]

    def detach(self) -> None:
        """Restore the engine as it was before."""
        for remove in self._remove:
            remove()
        self._remove = []

    def _refuse_moments_elsewhere(self, whole: dict[str, Tensor], whose: str) -> None:
        """Raise UserError if AdamW would move weights outside the mask. A collective, one pass over the moments."""
        if (num_elsewhere := count_moments_elsewhere(self._adapter, whole)) > 0:
            raise UserError(
                f"{whose} moments of {num_elsewhere} weights that the mask does not select, from steps without this "
                "mask: AdamW would go on moving them. Make a new engine of the model for every mask"
            )

    def _check_checkpoints(self) -> Callable[[], None]:
        """Refuse training checkpoints that were written without this mask; return undo."""
        load = self._engine.load_checkpoint

        @wraps(load)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            result = load(*args, **kwargs)
            # DeepSpeed returns (None, ...) if it found no checkpoint.
            if result[0] is not None:
                self._refuse_moments_elsewhere(self._whole, f"the checkpoint {result[0]} has")
            return result

        return override(self._engine, "load_checkpoint", load_checkpoint)

    def is_local_finite(self) -> bool | None:
        """Return None: DeepSpeed has added up the ranks' gradients, so a rank's own part is unknown."""
        return None

    def state(self) -> SelectedState:
        """Return the optimizer's state of the selected weights. A collective."""
        return read_selected_state(self._adapter, self._whole)

    def restore(self, state: SelectedState) -> None:
        """Resume from a state() of any number of ranks and any stage. The model must hold the task's first weights."""
        write_selected_state_(self._adapter, self._whole, state)
        params = dict(self._engine.module.named_parameters())
        sizes = [index.numel() for index in self._whole.values()]
        for (name, index), values in zip(self._whole.items(), state.tensors["values"].split(sizes), strict=True):
            SelectedWeights(params[name], index).write_(values.to(params[name].dtype))
        forget_secondary(self._engine.module)
