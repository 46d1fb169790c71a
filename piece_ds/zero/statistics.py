"""The statistics pass: sums of micro-batch gradients and of their squares, sharded, under any ZeRO stage.

Micro-batch b is computed by rank b mod W without reduction; its gradient goes to the owners of its elements as soon
as backward has finished a bucket of parameters, and is freed. Owners add in micro-batch order. The engine is left as
it was found: no step, no gradient, no random number drawn, no mode changed.
"""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from piece_ds import ops
from piece_ds.models.layout import layout_of
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.profiling import timed
from piece_ds.runtime.progress import progress_bar
from piece_ds.runtime.rank_status import report_status
from piece_ds.state.partition import Layout
from piece_ds.state.selected_values import selected_values
from piece_ds.state.statistics import GradientStats, empty_stats
from piece_ds.zero.exchange import Slice, exchange, plan_buckets, slice_range
from piece_ds.zero.nonfinite_counts import NonfiniteCounts
from piece_ds.zero.supported import adapter_for

logger = logging.getLogger(__name__)

# Gradients alive for exchange at a time: large enough that calls do not matter (64 MiB in bf16), small beside a model.
BUCKET_ELEMENTS = 1 << 25

# Unscaled, small fp16 gradients would lose bits below fp16's normal range. A power of two is divided out exactly.
FP16_LOSS_SCALE = 1024.0


class MicroBatchSource(Protocol):
    """Anything with a length whose item b is micro-batch b: model inputs with labels. A list does."""

    def __len__(self) -> int: ...

    def __getitem__(self, b: int, /) -> dict[str, Tensor]: ...


class LastPass(Protocol):
    """Adds the last round's gradients and finds candidates in the same pass (selection.LastPassFilter)."""

    def begin(self, stats: GradientStats) -> None: ...

    def accumulate_(
        self,
        grad: Tensor,
        grad_sum: Tensor | None,
        square_sum: Tensor,
        scale: float,
        num_nonfinite: Tensor,
        offset: int,
    ) -> None: ...


class StatisticsCheckpoint(Protocol):
    """Keeps the sums of an unfinished pass, so that another pass can go on from them."""

    def begin(self, stats: GradientStats) -> None:
        """Fill empty sums with those kept, and both counts with what is in them. A collective."""

    def is_due(self, num_done: int) -> bool:
        """Whether the sums are to be kept now that they hold num_done micro-batches; the same on all ranks."""

    def keep(self, stats: GradientStats) -> None:
        """Keep them. A collective."""


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
    """Sum of g and of g * g over micro-batches, where g is the gradient of the model's mean loss. A collective.

    Args:
        engine: deepspeed.DeepSpeedEngine at ZeRO 0-3, fp32, bf16 or fp16, whose model returns an output with `.loss`.
        micro_batches: all micro-batches of the data, the same on every rank, on the CPU; item b is read by one rank.
        needs_sum: also keep the sum of g (4 bytes per owned element more).
        device: where the sums live; None means where the gradients are.
        layout: of the model; None means layout_of(engine.module).
        description: of the progress bar.
        last_pass: finds candidates for selection while the last round is added; not used where there is one round.
        keeper: goes on from the sums of an unfinished pass, and keeps those of this one. The sums have the same bits.
    Returns:
        GradientStats of this rank's elements, in fp32, without loss scaling, clipping or division.
    Raises:
        UserError: DeepSpeed features that have not been proven; a compact update is attached.
        ValueError: no micro-batch.
    Cost: one forward and backward per micro-batch; 4 or 8 bytes per owned element, and two buckets of gradients.
    Source: arXiv 2511.15375, section on importance estimation.
    """
    if len(micro_batches) == 0:
        raise ValueError("no micro-batch to take statistics of: the data is empty")
    values = selected_values(engine.module)
    if values is not None and values.attached:
        raise UserError(
            "statistics were asked for while a compact update is attached, which takes the gradients of "
            "every backward: take them before attach(), or after detach()"
        )
    adapter = adapter_for(engine)
    layout = layout or layout_of(engine.module)
    stats = empty_stats(layout, needs_sum, device or engine.device)
    if keeper is not None:
        keeper.begin(stats)
    nonfinite = NonfiniteCounts(layout, stats.square_sum.device)
    num_before = stats.num_nonfinite
    loss_scale = FP16_LOSS_SCALE if engine.fp16_enabled() else 1.0
    receiver = _Receiver(engine, stats, nonfinite, 1.0 / loss_scale)
    rounds = range(stats.num_micro_batches, len(micro_batches), layout.num_ranks)
    with _undisturbed(engine), receiver.hooks(), adapter.local_backward():
        for first in progress_bar(rounds, description, unit="round"):
            report_status(f"{description}, from micro-batch {first}")
            # ZeRO-3 gathers together: a rank without a micro-batch repeats one, and nobody adds its gradient.
            b = first + layout.rank if first + layout.rank < len(micro_batches) else first
            batch = {k: v.to(engine.device) for k, v in micro_batches[b].items()}
            if last_pass is not None and 0 < first == rounds[-1]:
                last_pass.begin(stats)
                receiver.last_pass = last_pass
            receiver.begin_round(num_valid=min(layout.num_ranks, len(micro_batches) - first))
            loss = engine(**batch).loss
            # DeepSpeed multiplies by its own loss scale, where it has one; `* 1.0` also because DeepSpeed 0.19 divides
            # by the accumulation steps when it recognises the very tensor that forward returned.
            engine.backward(loss * (loss_scale / _engine_loss_scale(engine)), scale_wrt_gas=False)
            receiver.end_round()
            nonfinite.end_round(first)
            stats.num_micro_batches = min(first + layout.num_ranks, len(micro_batches))
            if keeper is not None and keeper.is_due(stats.num_micro_batches):
                stats.num_nonfinite = num_before + nonfinite.total()
                keeper.keep(stats)
    adapter.forget_backward()
    stats.num_nonfinite = num_before + nonfinite.total()
    if stats.num_nonfinite:
        stats.first_nonfinite = nonfinite.first()
        if is_main():
            logger.warning(
                "%d gradient entries were NaN or infinite and counted as 0%s",
                stats.num_nonfinite,
                _shown(stats.first_nonfinite, layout.num_ranks),
            )
    return stats


def _shown(first: tuple[int, str] | None, num_ranks: int) -> str:
    if first is None:
        return " (all of them before the pass was interrupted)"
    b, name = first
    return f": the first in {name}, from micro-batch {b} (counted from 0) on rank {b % num_ranks}"


def _engine_loss_scale(engine: Any) -> float:
    """What engine.backward multiplies the loss by."""
    if not hasattr(engine.optimizer, "scale_if_loss"):
        return 1.0
    one = torch.ones((), requires_grad=True) * 1.0  # a number it takes for a loss
    return float(engine.optimizer.scale_if_loss(one).detach())


class _Receiver:
    """Takes finished gradients off the parameters, exchanges them in a fixed order and adds what this rank owns."""

    def __init__(self, engine: Any, stats: GradientStats, nonfinite: NonfiniteCounts, scale: float) -> None:
        self.model, self.device = engine.module, engine.device
        self.stats, self.nonfinite, self.scale = stats, nonfinite, scale
        self.layout = stats.layout
        self.buckets = plan_buckets(self.layout, BUCKET_ELEMENTS)
        self.offset_of = {info.name: (offset, part.start) for info, part, offset in self.layout.owned()}
        self.dtype_of = {name: p.dtype for name, p in self.model.named_parameters()}
        # Ranks may use different parts of a ZeRO-3 leaf module (experts). To exchange as soon as one rank has its
        # gradients would wait for a rank that waits for the next gather, so these wait for the end of backward.
        self.late = {name for name, p in self.model.named_parameters() if hasattr(p, "ds_z3_leaf_module")}
        self.in_backward = False
        self.grads: dict[str, Tensor] = {}
        self.next_bucket = 0
        self.num_valid = 0
        self.last_pass: LastPass | None = None  # set for the last round

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """While open, every parameter's gradient comes here as soon as backward has finished it."""
        eligible = {info.name for info in self.layout.eligible()}
        # Under compact mode, the parameters are frozen for DeepSpeed.
        frozen = [p for name, p in self.model.named_parameters() if name in eligible and not p.requires_grad]
        for param in frozen:
            param.requires_grad_(True)
        handles = [
            param.register_post_accumulate_grad_hook(self._hook(name, name in eligible))
            for name, param in self.model.named_parameters()
            if param.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for param in frozen:
                param.requires_grad_(False)

    def _hook(self, name: str, eligible: bool) -> Callable[[nn.Parameter], None]:
        def take(param: nn.Parameter) -> None:
            grad, param.grad = param.grad, None
            if eligible and grad is not None:
                self.grads[name] = grad.detach().reshape(-1)
                self._flush_complete()

        return take

    def begin_round(self, num_valid: int) -> None:
        """The next backward is of a new micro-batch on every rank; only the first num_valid ranks' count."""
        self.grads.clear()
        self.next_bucket = 0
        self.num_valid = num_valid
        self.in_backward = True

    def end_round(self) -> None:
        """Send what is left. A parameter that this micro-batch did not use has gradient zero."""
        self.in_backward = False
        for info in self.layout.eligible():
            if info.name not in self.grads and self._is_pending(info.name):
                self.grads[info.name] = torch.zeros(info.numel, dtype=self.dtype_of[info.name], device=self.device)
        self._flush_complete()
        assert self.next_bucket == len(self.buckets)

    def _is_pending(self, name: str) -> bool:
        return any(part.info.name == name for bucket in self.buckets[self.next_bucket :] for part in bucket)

    def _flush_complete(self) -> None:
        """Exchange buckets in their fixed order while the next one is complete: every rank makes the same calls."""
        while self.next_bucket < len(self.buckets):
            bucket = self.buckets[self.next_bucket]
            names = {part.info.name for part in bucket}
            if not names <= self.grads.keys() or (self.in_backward and names & self.late):
                return
            for source, part, grad in exchange(bucket, self.grads, self.layout):
                if source < self.num_valid:
                    self._add(part, grad, source, is_last=source == self.num_valid - 1)
            for part in bucket:
                if part.last:
                    del self.grads[part.info.name]
            self.next_bucket += 1

    def _add(self, part: Slice, grad: Tensor, source: int, is_last: bool) -> None:
        offset, first = self.offset_of[part.info.name]
        start, stop = slice_range(part, self.layout.rank, self.layout.num_ranks)
        place = offset + start - first
        sums = self.stats.fragment(place, stop - start)
        grad = grad.to(self.stats.square_sum.device)
        count = self.nonfinite.slot(part.info.name, source)
        if is_last and self.last_pass is not None:
            self.last_pass.accumulate_(grad, *sums, self.scale, count, place)
        else:
            ops.accumulate_(grad, *sums, self.scale, count)


@contextmanager
def _undisturbed(engine: Any) -> Iterator[None]:
    """Training mode without dropout, so that gradient checkpointing works and nothing is random; then as it was."""
    module = engine.module
    was_training = {m: m.training for m in module.modules()}
    # Functional dropout reads its rate from attributes such as attention_dropout, layer dropout from layerdrop.
    rates = {
        (m, name): value
        for m in module.modules()
        for name, value in vars(m).items()
        if isinstance(value, float) and ("drop" in name or (isinstance(m, nn.Dropout) and name == "p"))
    }
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), torch.enable_grad():
        try:
            engine.train()
            for m, name in rates:
                setattr(m, name, 0.0)
            yield
        finally:
            for (m, name), value in rates.items():
                setattr(m, name, value)
            for m, mode in was_training.items():
                m.training = mode
            random.setstate(python_state)
            np.random.set_state(numpy_state)
