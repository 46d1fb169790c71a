"""NaN and infinite gradient entries of a statistics pass: how many, and where the first came from.

They are counted by parameter and sending rank while gradients are added, on the device and without waiting for it.
After the first round that has any, a copy of the counts is kept: it tells parameter and micro-batch.
"""

import torch
from torch import Tensor

from piece_ds.runtime.distributed import all_gather_objects, all_reduce_sum_, collective_device
from piece_ds.state.partition import Layout


class NonfiniteCounts:
    """Counts of what this rank owns. Memory: 16 bytes for each eligible parameter and rank."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._names = [info.name for info in layout.eligible()]
        self._row_of = {name: row for row, name in enumerate(self._names)}
        self._counts = torch.zeros(len(self._names), layout.num_ranks, dtype=torch.int64, device=device)
        self._first = torch.zeros_like(self._counts)
        self._micro_batch = torch.full((), -1, dtype=torch.int64, device=device)

    def slot(self, name: str, source: int) -> Tensor:
        """Where ops.accumulate_() counts a parameter's entries that rank `source` has sent: one int64."""
        return self._counts[self._row_of[name], source : source + 1]

    def end_round(self, first: int) -> None:
        """A round is over; its first micro-batch was number `first`, of rank 0."""
        is_new = (self._micro_batch < 0) & (self._counts > 0).any()
        self._first = torch.where(is_new, self._counts, self._first)
        self._micro_batch = torch.where(is_new, first, self._micro_batch)

    def total(self) -> int:
        """Entries on all ranks. A collective."""
        return int(all_reduce_sum_(self._counts.sum().view(1).to(collective_device(), copy=True)))

    def first(self) -> tuple[int, str] | None:
        """(micro-batch, parameter) of the first entry: earliest micro-batch, then the model's order. A collective."""
        places = []
        if int(self._micro_batch) >= 0:
            row, source = min(self._first.nonzero().tolist(), key=lambda place: (place[1], place[0]))
            places.append((int(self._micro_batch) + source, row))
        found = [place for places_of_rank in all_gather_objects(places) for place in places_of_rank]  # type: ignore[attr-defined]
        if not found:
            return None
        b, row = min(found)
        return b, self._names[row]
