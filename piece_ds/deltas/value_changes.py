"""Measure how far a task moved its selected values."""

from collections.abc import Iterable
from dataclasses import dataclass

from piece_ds.deltas.delta import Change


@dataclass
class ChangeSize:
    """Sums over selected values, in fp64.

    Attributes:
        num_values: how many there are.
        num_changed: how many differ after the task.
        sum_distance, max_distance: of |value - previous|.
        sum_previous: of |previous|.
    """

    num_values: int = 0
    num_changed: int = 0
    sum_distance: float = 0.0
    max_distance: float = 0.0
    sum_previous: float = 0.0

    @property
    def mean_distance(self) -> float:
        return self.sum_distance / self.num_values

    @property
    def relative(self) -> float:
        """Mean |value - previous| over mean |previous|; nan if all previous values are zero."""
        return self.sum_distance / self.sum_previous if self.sum_previous else float("nan")

    def add(self, change: Change) -> None:
        """Count one parameter's selected values."""
        assert change.previous is not None
        before = change.previous.double()
        distance = (change.values.double() - before).abs()
        self.num_values += distance.numel()
        self.num_changed += int(distance.count_nonzero())
        self.sum_distance += float(distance.sum())
        self.max_distance = max(self.max_distance, float(distance.max()))
        self.sum_previous += float(before.abs().sum())


def change_sizes(changes: Iterable[tuple[str, Change]]) -> dict[str, ChangeSize]:
    """Return label -> size of the changes, with labels in the order of their first change.

    Args:
        changes: (label, change of one parameter) pairs.
    """
    found: dict[str, ChangeSize] = {}
    for label, change in changes:
        found.setdefault(label, ChangeSize()).add(change)
    return found
