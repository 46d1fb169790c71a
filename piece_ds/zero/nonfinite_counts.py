"""Count NaN and infinite gradient entries of a statistics pass, and remember where the first came from.

They are counted by parameter and sending rank while gradients are added, on the device and without waiting for it. A
copy of the counts is kept after the first round that has any. It tells parameter and micro-batch.
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
        """Return the counter (one int64) for the entries of a parameter that rank `source` has sent.

        ops.accumulate_() adds to it.
        """
        return self._counts[self._row_of[name], source : source + 1]

    def end_round(self, first: int) -> None:
        """Keep the counts if this round was the first with any.

        Args:
            first: number of the round's first micro-batch, which is rank 0's.
        """
        # torch.where instead of an if: reading the flag would make the host wait.
        is_new = (self._micro_batch < 0) & (self._counts > 0).any()
        self._first = torch.where(is_new, self._counts, self._first)
        self._micro_batch = torch.where(is_new, first, self._micro_batch)

    def total(self) -> int:
        """Return the number of entries on all ranks. A collective."""
        return int(all_reduce_sum_(self._counts.sum().view(1).to(collective_device(), copy=True)))

    def first(self) -> tuple[int, str] | None:
        """Return (micro-batch, parameter) of the first entry, or None. A collective.

        Earlier micro-batches come first, then the model's order of parameters.
        """
        places = []
        if int(self._micro_batch) >= 0:
            row, source = min(self._first.nonzero().tolist(), key=lambda place: (place[1], place[0]))
            places.append((int(self._micro_batch) + source, row))

        # Ranks own different elements, so the earliest of all ranks' answers counts.
        found = [place for places_of_rank in all_gather_objects(places) for place in places_of_rank]  # type: ignore[attr-defined]
        if not found:
            return None
        b, row = min(found)
        return b, self._names[row]
