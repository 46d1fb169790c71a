"""Add rows of general text to every micro-batch of a task, so that the model keeps seeing what it knew before."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from piece_ds.config.settings import Settings


@dataclass(frozen=True)
class GeneralReplay:
    """Which rows join which micro-batch. Only its number decides, so a resumed run and any number of ranks agree.

    Attributes:
        rows: text that stands for general ability.
        collate: rows -> model inputs with labels.
        share: S, in (0, 1]: the share of a micro-batch's rows, and the weight of their loss.
        seed: of the draw.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    share: float
    seed: int

    def drawn(self, number: int, num_rows: int) -> list[int]:
        """Return the numbers of the rows that join a micro-batch: round(S * B), at least one.

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

    def batch(self, number: int, num_rows: int) -> dict[str, Tensor]:
        """Return these rows, collated, on the CPU."""
        return self.collate([self.rows[index] for index in self.drawn(number, num_rows)])


def replay_of(
    settings: Settings, rows: Sequence[Any] | None, collate: Callable[[list[Any]], dict[str, Tensor]], seed: int
) -> GeneralReplay | None:
    """Return what --general_replay asks for, or None without it.

    Args:
        settings: of the run.
        rows: text that stands for general ability, or None.
        collate: rows -> model inputs with labels.
        seed: another one for each task. Otherwise the same rows would come in the same order, and be learned by heart.
    """
    share = settings.method.general_replay
    return None if share == 0.0 or rows is None else GeneralReplay(rows, collate, share, seed)
