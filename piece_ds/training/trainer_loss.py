"""Give the statistics pass a trainer's own micro-batches and loss: importance is that of the loss that is trained.

A trainer of transformers or TRL may shape its batches (preference pairs, packed rows, generated completions) and its
loss (DFT, DPO, label smoothing) as it likes. What it notes for its log in the meantime is restored afterwards.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import datasets
from torch import Tensor
from transformers import Trainer

from piece_ds.data.collate import MicroBatches
from piece_ds.runtime.distributed import broadcast_object, is_main
from piece_ds.runtime.errors import UserError

# What TRL's trainers keep between steps.
_NOTES = (
    "_metrics",
    "_logs",
    "_total_train_tokens",
    "_step",
    "_buffered_inputs",
    "_pending_metrics",
    "_pending_extra_logs",
)


def trainer_micro_batches(trainer: Trainer, batch_size: int, num_rows: int | None = None) -> MicroBatches:
    """Return the trainer's training rows as micro-batches, collated as by its own data loader, with its loss.

    Args:
        trainer: of transformers or TRL.
        batch_size: rows in a micro-batch. If completions are generated, a row is a prompt, and all completions that the
            trainer makes for it belong to the micro-batch.
        num_rows: the first rows, which are all that is read of a data set that streams; None means all.
    Raises:
        UserError: the rows have no length, so they cannot be sharded over ranks, and num_rows is not given.
    """
    rows, collate = trainer.train_dataset, trainer.data_collator
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        if num_rows is None:
            raise UserError(
                f"PieceCallback expected training rows with a length, got {type(rows).__name__}: importance is summed "
                "over all of them; give importance_rows=N for the first N, or load the data set without streaming"
            )
        # One rank reads, since a stream may give ranks other rows.
        rows = broadcast_object(list(islice(iter(rows), num_rows)) if is_main() else None)

    # As the Trainer's own loader: columns that the model does not take are dropped.
    if isinstance(rows, datasets.Dataset):
        rows = trainer._remove_unused_columns(rows, description="importance")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="importance")
    return MicroBatches(rows, collate, batch_size, _loss_of(trainer))


def _loss_of(trainer: Trainer) -> Callable[[Any, Any], Tensor] | None:
    """Return (engine, micro-batch) -> the trainer's mean loss; None if that is the model's own."""
    # A method of a subclass, or a function that somebody has set on this trainer, is another loss.
    is_plain = getattr(trainer.compute_loss, "__func__", None) is Trainer.compute_loss
    if is_plain and trainer.compute_loss_func is None and trainer.label_smoother is None:
        return None
    generate = getattr(trainer, "_generate_and_score_completions", None)
    generated: tuple[Any, Any] = (None, None)  # the last micro-batch of prompts, and its completions

    def loss_of(engine: Any, batch: Any) -> Tensor:
        nonlocal generated
        if generate is not None:
            # A generating trainer makes completions now, as many a prompt as in a step. They are drawn once: the pass
            # takes the loss of its first micro-batch twice, and a loss that differs is refused as a random one.
            if generated[0] is not batch:
                count = getattr(trainer, "num_generations", 1)  # TRL's DistillationTrainer makes one a prompt
                generated = batch, generate([row for row in batch for _ in range(count)])
            batch = copy.copy(generated[1])
        # `* 1.0`: DeepSpeed 0.19 would divide the very tensor that forward returned by the accumulation steps.
        loss: Tensor = trainer.compute_loss(engine, batch) * 1.0
        return loss

    return loss_of


@contextmanager
def notes_kept(trainer: Trainer) -> Iterator[None]:
    """Let the trainer note inside what it likes for its log, and restore its notes on exit."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _NOTES if name in vars(trainer)}
    steps = vars(trainer).get("current_gradient_accumulation_steps")
    trainer.current_gradient_accumulation_steps = 1  # GRPO's loss is divided by it
    try:
        yield
    finally:
        vars(trainer).update(kept)
        if steps is None:
            del trainer.current_gradient_accumulation_steps
        else:
            trainer.current_gradient_accumulation_steps = steps
