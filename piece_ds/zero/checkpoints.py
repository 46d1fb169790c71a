"""Wrap the training checkpoints that DeepSpeed writes and reads, for a model with a parameter its user never sees."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from piece_ds.runtime.overriding import override


def install_checkpoints(
    engine: Any,
    saving: Callable[[], AbstractContextManager[None]],
    loading: Callable[[], AbstractContextManager[None]],
    after_load: Callable[[], None],
    save_full: bool,
    hidden: str,
) -> list[Callable[[], None]]:
    """Wrap an engine's save_checkpoint() and load_checkpoint(); return functions that remove the wrappers.

    Args:
        engine: deepspeed.DeepSpeedEngine.
        saving, loading: contexts entered around either call.
        after_load: called when a checkpoint has been loaded.
        save_full: if False, checkpoints leave out parameters that require no gradient.
        hidden: name of a parameter that consolidated state dicts (save_model() under ZeRO-3) leave out.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint
    consolidate = engine._zero3_consolidated_16bit_state_dict

    # The caller's own exclude_frozen_parameters is overruled: save_full decides.
    @wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with saving():
            return save(*args, **{**kwargs, "exclude_frozen_parameters": not save_full})

    @wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        with loading():
            result = load(*args, **kwargs)

        # DeepSpeed returns (None, ...) if it found no checkpoint.
        if result[0] is not None:
            after_load()
        return result

    @wraps(consolidate)
    def consolidated(*args: Any, **kwargs: Any) -> Any:
        state = consolidate(*args, **kwargs)
        if state is not None:  # rank 0's
            state.pop(hidden, None)
        return state

    # Set on the instance, so that removal restores what was there.
    wrapped = {
        "save_checkpoint": save_checkpoint,
        "load_checkpoint": load_checkpoint,
        "_zero3_consolidated_16bit_state_dict": consolidated,
    }
    return [override(engine, name, function) for name, function in wrapped.items()]
