"""Receive the gradients of a statistics pass: take them off the parameters, send them to their owners, add them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from piece_ds import ops
from piece_ds.runtime.errors import UserError
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.exchange import Slice, exchange, plan_buckets, slice_range
from piece_ds.zero.host_copies import HostCopies
from piece_ds.zero.leaf_modules import LeafModules
from piece_ds.zero.nonfinite_counts import NonfiniteCounts
from piece_ds.zero.partial_gradients import came_in_forward, came_in_parts, largest_counts


class LastPass(Protocol):
    """Adds the last round's gradients and finds candidates in the same pass (selection.candidates.LastPassFilter)."""

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


class GradientReceiver:
    """Take finished gradients off the parameters, exchange them in a fixed order and add what this rank owns."""

    def __init__(
        self,
        engine: Any,
        stats: GradientStats,
        nonfinite: NonfiniteCounts,
        scale: float,
        bucket_elements: int,
        num_parts: int = 1,
    ) -> None:
        """Plan the exchange. Nothing is hooked until hooks() is entered.

        Args:
            engine: whose backward finishes the gradients.
            stats: sums to which they are added.
            nonfinite: counter of their NaN and infinite entries.
            scale: factor on every gradient.
            bucket_elements: elements of gradients in exchange at a time, over all ranks.
            num_parts: consecutive ranks whose gradients are those of parts of the same rows, and add up to one.
        """
        self.model, self.device = engine.module, engine.device

        # What is added to, and in which order.
        self.stats, self.nonfinite, self.scale = stats, nonfinite, scale
        self.num_parts = num_parts
        self.layout = stats.layout
        self.buckets = plan_buckets(self.layout, bucket_elements)
        self.copies = HostCopies(engine.device, stats.square_sum.device)
        self.offset_of = {info.name: (offset, part.start) for info, part, offset in self.layout.owned()}
        self.numel_of = {info.name: info.numel for info in self.layout.eligible()}
        self.dtype_of = {name: p.dtype for name, p in self.model.named_parameters()}
        # Ranks may use different parts of a ZeRO-3 leaf module (experts). To exchange as soon as one rank has its
        # gradients would wait for a rank that waits for the next gather. So these wait until backward leaves the
        # module, or for the end of backward if it enters the module more than once.
        self.leaves = LeafModules(self.model)
        self.late = set(self.leaves.names)
        self.in_parts: set[str] = set()  # of late, those that wait for the end of backward

        # State of the current round.
        self.in_backward = False
        self.part_counts: dict[str, int] | None = None  # set for the backward in which parts are counted
        self.grads: dict[str, Tensor] = {}
        self.taken: set[str] = set()  # parameters whose gradient has come in this round
        self.waiting: set[str] = set()  # of late, those whose gradient may not be exchanged yet
        self.next_bucket = 0
        self.num_valid = 0
        self.last_pass: LastPass | None = None  # set for the last round

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Enter a context in which every gradient comes here as soon as backward has finished it."""
        eligible = {info.name for info in self.layout.eligible()}
        # Under compact mode, the parameters are frozen for DeepSpeed.
        frozen = [p for name, p in self.model.named_parameters() if name in eligible and not p.requires_grad]
        for param in frozen:
            param.requires_grad_(True)

        # Ineligible parameters are hooked as well: their gradients are freed at once.
        handles = [
            param.register_post_accumulate_grad_hook(self._hook(name, name in eligible))
            for name, param in self.model.named_parameters()
            if param.requires_grad
        ]
        handles += self.leaves.hooks(self._left)
        try:
            yield
        finally:
            self.copies.forget()  # some wait only if the pass has failed
            for handle in handles:
                handle.remove()
            for param in frozen:
                param.requires_grad_(False)

    def _hook(self, name: str, eligible: bool) -> Callable[[nn.Parameter], None]:
        def take(param: nn.Parameter) -> None:
            # Freed from the parameter, so that DeepSpeed never sees it.
            grad, param.grad = param.grad, None
            if not self.in_backward:
                raise UserError(came_in_forward(name))
            if self.part_counts is not None:
                self.part_counts[name] += 1
            elif eligible and grad is not None:
                self._take(name, grad.detach().reshape(-1))
                self._flush_complete()

        return take

    def _left(self, names: Iterable[str]) -> None:
        """Exchange what waited for backward to leave a leaf module. What the micro-batch did not use is zero."""
        if self.part_counts is not None:
            return
        names = set(names) & self.waiting - self.in_parts
        self.waiting -= names
        self._fill(name for name in names if name not in self.taken)
        self._flush_complete()

    def _take(self, name: str, grad: Tensor) -> None:
        if name not in self.taken:
            self.grads[name] = grad
        elif name in self.waiting:
            self.grads[name] = self.grads[name] + grad
        else:  # the first part may have been sent as the whole
            raise UserError(came_in_parts(name))
        self.taken.add(name)

    @contextmanager
    def finding_parts(self) -> Iterator[None]:
        """Find parameters whose gradients come in parts, in the backward inside, which is not added. A collective.

        In later rounds these parameters wait for the end of backward.
        """
        self.part_counts = dict.fromkeys(self.dtype_of, 0)
        yield
        counts, self.part_counts = self.part_counts, None
        self.in_parts = {name for name, count in largest_counts(counts).items() if count > 1}
        self.late |= self.in_parts
        self.waiting |= self.in_parts

    def begin_round(self, num_valid: int) -> None:
        """Prepare for the backward of a new micro-batch on every rank.

        Args:
            num_valid: the gradients of the first num_valid micro-batches count; the others are repeated ones.
        """
        self.grads.clear()
        self.taken.clear()
        self.leaves.begin_round()
        self.waiting = set(self.late)
        self.next_bucket = 0
        self.num_valid = num_valid

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Enter a context in which gradients are expected. Those that come outside of it are refused."""
        self.leaves.end_forward()
        self.in_backward = True
        try:
            yield
        finally:
            self.in_backward = False

    def end_round(self) -> None:
        """Send what is left. A parameter that this micro-batch did not use has gradient zero."""
        self.waiting.clear()
        pending = {part.info.name for bucket in self.buckets[self.next_bucket :] for part in bucket}
        self._fill(pending - self.grads.keys())
        self._flush_complete()
        self.copies.drain()
        assert self.next_bucket == len(self.buckets)

    def _fill(self, names: Iterable[str]) -> None:
        """Set gradients to zero. A second gradient of one of them is refused: zero may have been sent already."""
        for name in names:
            if name in self.numel_of:
                self.grads[name] = torch.zeros(self.numel_of[name], dtype=self.dtype_of[name], device=self.device)
                self.taken.add(name)

    def _flush_complete(self) -> None:
        """Exchange buckets in their fixed order while the next one is complete: every rank makes the same calls."""
        while self.next_bucket < len(self.buckets):
            bucket = self.buckets[self.next_bucket]
            names = {part.info.name for part in bucket}

            # Stop at the first incomplete bucket, even if a later one is complete.
            if not names <= self.grads.keys() or names & self.waiting:
                return
            sums: dict[int, Tensor] = {}  # of the parts of a micro-batch, by the slice's place in the bucket
            for number, (source, part, grad) in enumerate(exchange(bucket, self.grads, self.layout)):
                micro_batch, part_number = divmod(source, self.num_parts)
                if micro_batch >= self.num_valid:
                    break
                if self.num_parts > 1:
                    place = number % len(bucket)
                    sums[place] = grad.float() if part_number == 0 else sums[place] + grad
                    grad = sums[place]
                if part_number == self.num_parts - 1:
                    self._add(part, grad, micro_batch, is_last=micro_batch == self.num_valid - 1)

            # A gradient is freed once its last slice has been sent.
            for part in bucket:
                if part.last:
                    del self.grads[part.info.name]
            self.next_bucket += 1

    def _add(self, part: Slice, grad: Tensor, source: int, is_last: bool) -> None:
        # Find the sums and the counter of this slice.
        offset, first = self.offset_of[part.info.name]
        start, stop = slice_range(part, self.layout.rank, self.layout.num_ranks)
        place = offset + start - first
        sums = self.stats.fragment(place, stop - start)
        count = self.nonfinite.slot(part.info.name, source)
        last_pass = self.last_pass if is_last else None

        # Bound now, called when the gradient has reached the sums' device.
        def add(own: Tensor) -> None:
            if last_pass is not None:
                last_pass.accumulate_(own, *sums, self.scale, count, place)
            else:
                ops.accumulate_(own, *sums, self.scale, count)

        self.copies.put(grad, add)
