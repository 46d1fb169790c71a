"""Write the trained model of a task as a transformers folder that appears whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer

from piece_ds.methods.baseline import Baseline, TaskContext
from piece_ds.models.processor import Processing
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.files import let_others_read, not_written
from piece_ds.zero.whole_state import whole_state


def save_model(trainer: Trainer, folder: Path) -> None:
    """Write the trained model as a transformers folder that appears whole. A collective.

    Every tensor is stored once, at every ZeRO stage. The Trainer's own save_model() stores tied weights twice at stages
    0 to 2, and none at stage 3 without stage3_gather_16bit_weights_on_model_save.
    """
    with _appearing_whole(folder) as temporary:
        # Every rank takes part in gathering; one of them writes.
        state = whole_state(trainer.model_wrapped)
        if is_main():
            trainer.model.save_pretrained(str(temporary), state_dict=state)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(str(temporary))


def save_baseline(
    method: Baseline,
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    context: TaskContext,
    tokenizer: Processing,
    folder: Path | None,
) -> None:
    """Write the trained model as a baseline writes it. A collective.

    Args:
        method: the baseline.
        model: the trained model.
        state: its whole state_dict(), on rank 0.
        context: of the task.
        tokenizer: the model's, or its processor.
        folder: of the model. If it is None, the baseline writes only what it needs itself.
    """
    if folder is None:
        if is_main():
            method.save_model(model, state, context, None)
        barrier()
        return
    with _appearing_whole(folder) as temporary:
        if is_main():
            method.save_model(model, state, context, temporary)
            tokenizer.save_pretrained(str(temporary))


@contextmanager
def _appearing_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, the same on all ranks, that replaces folder at the end. A collective."""
    temporary = folder.with_name(f".{folder.name}.0.tmp")
    try:
        yield temporary
        if is_main():
            let_others_read(temporary)
            # Renaming cannot replace a folder that is not empty.
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise not_written(folder, error) from error
    barrier()
