"""The micro-batches of the statistics pass: B consecutive rows of the data each, in the data's order."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class MicroBatches:
    """Item b is rows [b B, (b + 1) B), collated; the last has what is left. Collated when asked for, not kept.

    Attributes:
        rows: a dataset with length and integer access.
        collate: rows -> model inputs with labels.
        batch_size: B.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, b: int) -> dict[str, Tensor]:
        if not 0 <= b < len(self):
            raise IndexError(b)
        stop = min((b + 1) * self.batch_size, len(self.rows))
        return self.collate([self.rows[i] for i in range(b * self.batch_size, stop)])

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[b] for b in range(len(self)))
