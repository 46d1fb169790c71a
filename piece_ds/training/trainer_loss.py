"""Give the statistics pass a trainer's own micro-batches and loss: importance is that of the loss that is trained.

A trainer of transformers or TRL may shape its batches (preference pairs, packed rows, generated completions) and its
loss (DFT, DPO, label smoothing) as it likes. What it notes for its log in the meantime is restored afterwards.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer

from piece_ds.data.collate import MicroBatches
from piece_ds.runtime.distributed import broadcast_object, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.training.lone_rank import lone_rank, own_draws
from piece_ds.training.trainer_checks import has_plain_loss

# What TRL's trainers keep between steps, besides plain numbers and texts.
_NOTES = ("_metrics", "_logs", "_pending_metrics", "_pending_extra_logs")
_PLAIN = (int, float, str, type(None))


@dataclass(frozen=True)
class _Prompts(MicroBatches):
    """Micro-batches of a trainer that makes completions: each knows its number, which decides what is drawn."""

    def __getitem__(self, b: int) -> Any:
        return {"number": b, "prompts": super().__getitem__(b)}


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
    generate = getattr(trainer, "_generate_and_score_completions", None)
    if generate is not None:
        return _Prompts(rows, collate, batch_size, _loss_of_completions(trainer, generate))
    return MicroBatches(rows, collate, batch_size, _loss_of(trainer))


def _loss_of(trainer: Trainer) -> Callable[[Any, Any], Tensor] | None:
    """Return (engine, micro-batch) -> the trainer's mean loss; None if that is the model's own."""
    # A method of a subclass, or a function that somebody has set on this trainer, is another loss.
    is_plain = has_plain_loss(trainer) and type(trainer)._prepare_inputs is Trainer._prepare_inputs
    if is_plain and trainer.compute_loss_func is None and trainer.label_smoother is None:
        return None
    # Copies, since a trainer may take parts out of its batch, and the pass may take the loss twice.
    return lambda engine, batch: _loss(trainer, engine, trainer._prepare_inputs(copy.copy(batch)))


def _loss_of_completions(trainer: Any, generate: Callable[[list[Any]], Any]) -> Callable[[Any, Any], Tensor]:
    """Return (engine, micro-batch of prompts) -> the trainer's mean loss of completions that it makes now.

    As many a prompt as in a step. They are drawn once a micro-batch: the pass may take its loss twice, and a loss that
    differs is refused as a random one. The seed and the micro-batch decide what is drawn, not the rank.
    """
    generated: tuple[Any, Any] = (None, None)  # the last micro-batch of prompts, and its completions

    def loss_of(engine: Any, batch: Any) -> Tensor:
        nonlocal generated
        if generated[0] is not batch:
            count = getattr(trainer, "num_generations", 1)  # TRL's DistillationTrainer makes one a prompt
            rows = [row for row in batch["prompts"] for _ in range(count)]
            with _alone(trainer), own_draws(torch.device(trainer.args.device), trainer.args.seed, batch["number"]):
                generated = batch, generate(rows)
        return _loss(trainer, engine, copy.copy(generated[1]))

    return loss_of


def _loss(trainer: Trainer, engine: Any, batch: Any) -> Tensor:
    # `* 1.0`: DeepSpeed 0.19 would divide the very tensor that forward returned by the accumulation steps.
    with _alone(trainer):
        loss: Tensor = trainer.compute_loss(engine, batch) * 1.0
    return loss


def _alone(trainer: Any) -> Any:
    """Return a context in which a trainer's loss holds nothing of other ranks' rows."""
    # vLLM's ranks make completions together.
    return nullcontext() if getattr(trainer, "use_vllm", False) else lone_rank(trainer.accelerator)


@contextmanager
def notes_kept(trainer: Trainer) -> Iterator[None]:
    """Let the trainer note inside what it likes for its log, and restore its notes on exit."""
    kept = {name: copy.deepcopy(vars(trainer)[name]) for name in _NOTES if name in vars(trainer)}
    # Counts, and what the loss adapts from step to step (GRPO's entropy_coef).
    kept |= {name: value for name, value in vars(trainer).items() if isinstance(value, _PLAIN)}
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
