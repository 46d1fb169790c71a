"""Run the statistics pass: sums of micro-batch gradients and of their squares, sharded, under any ZeRO stage.

Rank b mod W computes micro-batch b without reduction (for an exception see rounds_of()); with sequence parallelism a
group of ranks does, and the sum of their gradients is that of the micro-batch. A gradient goes to the owners of its
elements as soon as backward has finished a bucket of parameters, and is freed. Owners add in micro-batch order. The
engine is left as it was: no step, no gradient, no random number drawn, no mode changed.
"""

import logging
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from piece_ds.models.adapters import refuse_adapters
from piece_ds.models.layout import layout_of
from piece_ds.runtime.deterministic import deterministic_algorithms, nondeterministic_operation
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.profiling import timed
from piece_ds.runtime.progress import progress_bar
from piece_ds.runtime.rank_status import report_status
from piece_ds.state.partition import Layout
from piece_ds.state.selected_values import selected_values
from piece_ds.state.statistics import GradientStats, empty_stats
from piece_ds.zero.adapter import Adapter
from piece_ds.zero.batch_feed import BatchFeed, MicroBatchSource, loss_of, rounds_of
from piece_ds.zero.nonfinite_counts import NonfiniteCounts
from piece_ds.zero.partial_gradients import may_come_in_parts
from piece_ds.zero.random_draws import DrawWatch, any_rank, refuse_random_loss
from piece_ds.zero.receiver import GradientReceiver, LastPass
from piece_ds.zero.sequence_parallel import SequenceGroup, SequenceShards, proof_rows, prove_parts, sequence_group
from piece_ds.zero.supported import adapter_for, require_engine
from piece_ds.zero.undisturbed import undisturbed

logger = logging.getLogger(__name__)

# Gradients alive for exchange at a time: large enough that calls do not matter (64 MiB in bf16), small beside a model.
BUCKET_ELEMENTS = 1 << 25

# Unscaled, small fp16 gradients would lose bits below fp16's normal range. A power of two is divided out exactly.
FP16_LOSS_SCALE = 1024.0


class StatisticsCheckpoint(Protocol):
    """Keeps the sums of an unfinished pass, so that another pass can resume from them."""

    def begin(self, stats: GradientStats) -> None:
        """Fill empty sums with those kept, and both counts with what is in them. A collective."""

    def is_due(self, num_done: int) -> bool:
        """Return whether to keep the sums now that they hold num_done micro-batches; the same on all ranks."""

    def keep(self, stats: GradientStats) -> None:
        """Keep the sums. A collective."""


@timed("statistics")
def collect_statistics(
    engine: Any,
    micro_batches: MicroBatchSource,
    needs_sum: bool = True,
    device: torch.device | str | None = None,
    layout: Layout | None = None,
    description: str = "statistics",
    last_pass: LastPass | None = None,
    keeper: StatisticsCheckpoint | None = None,
) -> GradientStats:
    """Return the sums of g and g * g over micro-batches, where g is the gradient of the mean loss. A collective.

    Args:
        engine: deepspeed.DeepSpeedEngine at ZeRO 0-3, in fp32, bf16 or fp16. Its model returns an output with `.loss`,
            unless micro_batches define a loss of their own.
        micro_batches: all micro-batches of the data, the same on every rank, on the CPU; item b is read by one rank.
            See MicroBatchSource.
        needs_sum: also keep the sum of g (4 bytes more per owned element).
        device: device of the sums; None means the engine's device.
        layout: of the model; None means layout_of(engine.module).
        description: of the progress bar.
        last_pass: finds candidates for selection while the last round is added; not used if there is only one round.
        keeper: resumes from the sums of an unfinished pass, and keeps those of this one. The sums have the same bits.
    Returns:
        GradientStats of this rank's elements, in fp32, without loss scaling, clipping or division. Every run on the
        same machine gives the same bits, because on CUDA torch's deterministic algorithms are on during the pass. If an
        operation has none, a warning names it and the pass begins again without them.
    Raises:
        UserError: the engine uses DeepSpeed features that have not been proven, its model has an adapter of PEFT, or a
            compact update is attached.
        ValueError: there is no micro-batch.
    Cost: one forward and backward per micro-batch; 4 or 8 bytes per owned element, and two buckets of gradients.
    Source: arXiv 2511.15375, section on importance estimation.
    """
    # Refuse what has no statistics.
    require_engine(engine)
    refuse_adapters(engine.module, "collect_statistics()")
    if len(micro_batches) == 0:
        raise ValueError("no micro-batch to take statistics of: the data is empty")
    values = selected_values(engine.module)
    if values is not None and values.attached:
        raise UserError(
            "statistics were asked for while a compact update is attached, which takes the gradients of "
            "every backward: take them before attach(), or after detach()"
        )

    # One pass, which may have to run twice.
    adapter = adapter_for(engine)
    layout = layout or layout_of(engine.module)
    one_pass = partial(
        _pass,
        engine,
        adapter,
        micro_batches,
        layout,
        needs_sum=needs_sum,
        device=device or engine.device,
        description=description,
        last_pass=last_pass,
        keeper=keeper,
    )

    # Prefer deterministic operations.
    if not _may_vary(engine.device):
        return one_pass()
    try:
        with deterministic_algorithms():
            return one_pass()
    except RuntimeError as error:
        operation = nondeterministic_operation(error)
        if operation is None or torch.are_deterministic_algorithms_enabled():  # the caller asked for it himself
            raise
    # Every rank runs the same operations, so all of them come here from the same one.
    adapter.abandon_backward()
    if is_main():
        logger.warning(
            "%s has no deterministic form: the %s pass runs without, and another run may select slightly other weights",
            operation,
            description,
        )
    return one_pass()


def _may_vary(device: torch.device) -> bool:
    """Return whether torch's operations may give different bits on device in every run unless asked not to."""
    return torch.device(device).type == "cuda"


def _pass(
    engine: Any,
    adapter: Adapter,
    micro_batches: MicroBatchSource,
    layout: Layout,
    *,
    needs_sum: bool,
    device: torch.device | str,
    description: str,
    last_pass: LastPass | None,
    keeper: StatisticsCheckpoint | None,
) -> GradientStats:
    """Run collect_statistics() once everything has been found and checked."""
    # Sums: empty, or those of an unfinished pass.
    stats = empty_stats(layout, needs_sum, device)
    if keeper is not None:
        keeper.begin(stats)
    nonfinite = NonfiniteCounts(layout, stats.square_sum.device)
    num_before = stats.num_nonfinite

    # Who computes what, and where gradients go.
    loss_scale = FP16_LOSS_SCALE if engine.fp16_enabled() else 1.0
    where = sequence_group(engine)
    receiver = GradientReceiver(engine, stats, nonfinite, 1.0 / loss_scale, BUCKET_ELEMENTS, where.size)
    rounds = rounds_of(micro_batches, stats.num_micro_batches, where.num_shards)
    # ZeRO-3 gathers together: a rank without a micro-batch repeats one, and nobody adds its gradient.
    numbers = [taken[where.shard] if where.shard < len(taken) else taken[0] for taken in rounds]
    whole, micro_batches = micro_batches, micro_batches if where.size == 1 else SequenceShards(micro_batches, engine)
    feed = BatchFeed(micro_batches, numbers, engine.device)

    def backward(loss: Tensor) -> None:
        # DeepSpeed multiplies by its own loss scale, if it has one. The product is also needed because 0.19 divides
        # by the accumulation steps when it recognises the very tensor that forward returned.
        with receiver.backward():
            engine.backward(loss * (loss_scale / _engine_loss_scale(engine)), scale_wrt_gas=False)

    # One micro-batch a rank and round.
    with undisturbed(engine), receiver.hooks(), adapter.local_backward():
        if isinstance(micro_batches, SequenceShards) and numbers:
            prove_parts(engine, proof_rows(whole[numbers[0]]), micro_batches)
        for taken in progress_bar(rounds, description, unit="round"):
            report_status(f"{description}, from micro-batch {taken.start}")
            batch = feed.take()
            if last_pass is not None and taken.start > 0 and taken == rounds[-1]:
                last_pass.begin(stats)
                receiver.last_pass = last_pass
            receiver.begin_round(num_valid=len(taken))
            watch = DrawWatch(engine.device) if taken == rounds[0] else None
            loss = loss_of(micro_batches, engine, batch)
            drew = watch is not None and any_rank(watch.drew())
            feed.read_ahead()

            # Only the first forward and backward can tell. They are repeated, since that backward was not added.
            if watch is not None and (may_come_in_parts(loss) or drew):
                with receiver.finding_parts():
                    backward(loss)
                again = loss_of(micro_batches, engine, batch)
                if drew:
                    refuse_random_loss(engine, loss, again, partial(loss_of, micro_batches, engine, batch))
                loss = again
            backward(loss)
            receiver.end_round()
            nonfinite.end_round(taken.start)
            stats.num_micro_batches = taken.stop
            if keeper is not None and keeper.is_due(stats.num_micro_batches):
                stats.num_nonfinite = num_before + nonfinite.total()
                keeper.keep(stats)
    adapter.forget_backward()

    # What did not count.
    stats.num_nonfinite = num_before + nonfinite.total()
    if stats.num_nonfinite:
        stats.first_nonfinite = nonfinite.first()
        if is_main():
            logger.warning(
                "%d gradient entries were NaN or infinite and counted as 0%s",
                stats.num_nonfinite,
                _shown(stats.first_nonfinite, rounds, where),
            )
    return stats


def _shown(first: tuple[int, str] | None, rounds: list[range], where: SequenceGroup) -> str:
    if first is None:
        return " (all of them before the pass was interrupted)"
    b, name = first
    shard = next(taken.index(b) for taken in rounds if b in taken)
    return f": the first in {name}, from micro-batch {b} (counted from 0) on rank {shard * where.size}"


def _engine_loss_scale(engine: Any) -> float:
    """Return the number by which engine.backward multiplies the loss."""
    if not hasattr(engine.optimizer, "scale_if_loss"):
        return 1.0
    one = torch.ones((), requires_grad=True) * 1.0  # a number it takes for a loss
    return float(engine.optimizer.scale_if_loss(one).detach())
