"""Train on rows that several ranks share (--sequence_parallel_size), with the steps that each rank alone would take.

Every rank has whole rows of its own, as without it. The S ranks of a group then take turns: together they compute the
micro-batch of the first of them, each a range of the tokens, then that of the second. So steps, orders of rows,
schedules and checkpoints are those of ranks that share nothing, and a rank holds activations of 1 / S of a micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.errors import UserError
from piece_ds.zero.sequence_attention import exchanging_attention, sharing_engines, whole_rows
from piece_ds.zero.sequence_parallel import SequenceShards, gradient_divisor, proof_rows, prove_parts
from piece_ds.zero.undisturbed import undisturbed


class SequenceTraining:
    """How a trainer's ranks share rows.

    Attributes:
        size: S, ranks that share a row.
    """

    def __init__(self, size: int, num_rows: int) -> None:
        """Say how rows are shared.

        Args:
            size: S.
            num_rows: the most rows of a micro-batch, in training and in statistics.
        """
        self.size, self._num_rows = size, num_rows
        self._is_proven = False

    @contextmanager
    def attention(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model in training mode takes ranges of rows. A collective."""
        with exchanging_attention(model, self.size, self._num_rows):
            yield

    def engine(self) -> AbstractContextManager[None]:
        """Inside, DeepSpeed makes engines whose ranks share rows."""
        return sharing_engines(self.size)

    def part(self, engine: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return this rank's range of a micro-batch of whole rows, which is the same on the ranks that share it."""
        return SequenceShards([], engine).part(inputs)

    def step(
        self,
        trainer: Trainer,
        engine: Any,
        inputs: dict[str, Any],
        num_items: Any,
        general: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Run forward and backward of this round's micro-batches; return this rank's own loss, detached. A collective.

        Args:
            trainer: whose step it is.
            engine: its DeepSpeed engine.
            inputs: this rank's micro-batch, whole rows, padded on the right.
            num_items: by what the trainer divides sums of losses, or None for the mean of each micro-batch.
            general: what general text adds to this rank's own micro-batch; its rows stay whole, since they are short.
        Raises:
            UserError: the model's layers do not take part in the exchange, or its rows cannot be cut.
        Cost: the tokens of S micro-batches cross through the host; S forward and backward passes of a range each.
        """
        if not trainer.model_accepts_loss_kwargs:
            raise UserError(
                f"--sequence_parallel_size: {type(engine.module).__name__} takes no labels that were shifted before "
                "rows are cut; use --sequence_parallel_size 1"
            )
        shards = SequenceShards([], engine)
        where = shards.where
        every: list[Any] = [None] * where.size
        host = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        dist.all_gather_object(every, (host, num_items), group=where.group)

        # Once: ranges of a row say what the row says. With a given mask no statistics pass has shown it.
        if not self._is_proven:
            with undisturbed(engine):
                prove_parts(engine, proof_rows(every[0][0]), shards)
            self._is_proven = True

        # General text first: the backward pass that ends a step has to be the last.
        scale = gradient_divisor(engine) / world_size()
        added = torch.zeros(())
        if general is not None:
            with whole_rows(), trainer.compute_loss_context_manager():
                extra = general()
            added = extra.detach().clone()
            engine.set_gradient_accumulation_boundary(False)
            engine.backward(_summed(extra, added, scale, trainer, num_items), scale_wrt_gas=False)

        # Micro-batch after micro-batch, each on all ranks of the group. DeepSpeed averages in the end.
        own = torch.zeros(())
        for place, (batch, count) in enumerate(every):
            part = {name: value.to(engine.device) for name, value in shards.part(batch).items()}
            count = count.to(engine.device) if isinstance(count, Tensor) else count
            with trainer.compute_loss_context_manager():
                loss = Trainer.compute_loss(trainer, engine, part, num_items_in_batch=count)
            whole = loss.detach().clone()
            dist.all_reduce(whole, group=where.group)
            if place == where.place:
                own = whole

            loss = _summed(loss, whole, scale, trainer, count)
            if place + 1 < where.size:
                engine.set_gradient_accumulation_boundary(False)
                engine.backward(loss, scale_wrt_gas=False)
            else:
                trainer.accelerator.backward(loss, scale_wrt_gas=False)
        return own + added.to(own.device)


def _summed(loss: Tensor, whole: Tensor, scale: float, trainer: Trainer, num_items: Any) -> Tensor:
    """Return a part of a micro-batch's loss as backward takes it.

    An infinite loss becomes NaN, which every rank sees in the norm of the reduced gradient.
    """
    share = scale / trainer.current_gradient_accumulation_steps if num_items is None else scale
    return loss * share * torch.where(whole.isfinite(), 1.0, torch.nan).to(loss.dtype)


def sequence_training(size: int, num_rows: int) -> SequenceTraining | None:
    """Return how a trainer's ranks share rows, or None if each has its own."""
    return SequenceTraining(size, num_rows) if size > 1 else None
