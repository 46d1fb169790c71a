"""The trained model of a task, written as a transformers folder that appears whole."""

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
from piece_ds.runtime.files import not_written


def save_model(trainer: Trainer, folder: Path) -> None:
    """Write the trained model as a transformers folder that appears whole. A collective."""
    with _appearing_whole(folder) as temporary:
        trainer.save_model(str(temporary))
        if is_main():
            (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle; run.json says more


def save_baseline(
    method: Baseline,
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    context: TaskContext,
    tokenizer: Processing,
    folder: Path | None,
) -> None:
    """Write the trained model as a baseline writes it, if folder is not None. A collective."""
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
    """Yield a temporary folder, the same on all ranks, that takes the place of folder at the end. A collective."""
    temporary = folder.with_name(f".{folder.name}.0.tmp")
    try:
        yield temporary
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise not_written(folder, error) from error
    barrier()
