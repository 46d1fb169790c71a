"""Choose the rows of general text that join every micro-batch of a task. Only its number decides."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Rows of general text per row of the task, if --general_kl is given without --general_replay or --general_share.
KL_SHARE = 0.25


def rows_per_row(share: float | None, replay: float) -> float:
    """Return how many rows of general text join a row of the task: what was asked for, or the default."""
    return share if share is not None else replay or KL_SHARE


@dataclass(frozen=True)
class GeneralRows:
    """Which rows join which micro-batch. A resumed run and any number of ranks agree.

    Attributes:
        rows: text that stands for general ability.
        collate: rows -> model inputs with labels.
        share: rows of it per row of a micro-batch.
        seed: of the draw.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    share: float
    seed: int

    def drawn(self, number: int, num_rows: int) -> list[int]:
        """Return the numbers of the rows that join a micro-batch: round(share * B), at least one.

        No row is drawn twice unless there are too few.

        Args:
            number: of the micro-batch over all ranks and steps of the task.
            num_rows: B, rows of the micro-batch.
        """
        draw = random.Random(f"general replay/{self.seed}/{number}")
        wanted = max(1, round(self.share * num_rows))
        found: list[int] = []

        # All rows once before any comes twice.
        while len(found) < wanted:
            found += draw.sample(range(len(self.rows)), min(wanted - len(found), len(self.rows)))
        return found

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """Return rows by their numbers, collated, on the CPU."""
        return self.collate([self.rows[index] for index in chosen])
