"""One measure on every task after every task, and the figures of continual learning derived from it.

T tasks, counted from 0. R[i][j] is the measure on task j after training on task i; the row `before` is the model
before any task. None means not evaluated: a term with None leaves a mean, and a mean of nothing is None. A nan is a
result (of a model that diverged) and stays one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

Row = tuple[float | None, ...]

FIGURES = (
    "overall",
    "learning",
    "backward_transfer",
    "backward_transfer_authors",
    "forgetting",
    "forward_transfer",
)


@dataclass(frozen=True)
class Measure:
    """One measure of all tasks along the stream.

    Attributes:
        after: row i is R[i][.], taken after task i; as many rows as tasks have been trained, each T long.
        before: the model before any task, T long, or None when it was not evaluated.
        higher_is_better: True for accuracy, False for a loss. Differences keep the measure's own sign: a backward
            transfer of +0.3 is good for accuracy and bad for a loss. forgetting alone is always positive for a loss
            of ability.
    """

    after: tuple[Row, ...] = ()
    before: Row | None = None
    higher_is_better: bool = True

    def overall(self, stage: int | None = None) -> float | None:
        """OP: mean over the tasks j <= stage of R[stage][j]; stage None means the last trained."""
        stage = len(self.after) - 1 if stage is None else stage
        return _mean(self.after[stage][: stage + 1]) if stage >= 0 else None

    def learning(self) -> float | None:
        """Mean of the diagonal, R[i][i]: each task right after it was learned."""
        return _mean(self._diagonal())

    def backward_transfer(self) -> float | None:
        """BWT: mean over i < t of R[t][i] - R[i][i], t the last trained task. None with fewer than two tasks."""
        return self._backward_transfer(stage=len(self.after) - 1, num_tasks=len(self.after) - 1)

    def backward_transfer_authors(self) -> float | None:
        """BWT as the method's authors compute it: the last task is left out altogether.

        With T trained tasks, stage T-2 is the last that counts, and the mean over i <= T-2 of R[T-2][i] - R[i][i]
        includes the term i = T-2, which is zero by definition. None with fewer than two tasks.
        """
        return self._backward_transfer(stage=len(self.after) - 2, num_tasks=len(self.after) - 1)

    def forgetting(self) -> float | None:
        """Mean over i < t of (best of R[l][i], i <= l < t) - R[t][i]; for a loss R[t][i] - the lowest.

        Positive where ability was lost. None with fewer than two tasks.
        """
        last = len(self.after) - 1
        sign, best = (1.0, max) if self.higher_is_better else (-1.0, min)
        losses: list[float | None] = []
        for task in range(last):
            column = [row[task] for row in self.after[task:]]
            earlier = [value for value in column[:-1] if value is not None]
            lost = difference(best(earlier, default=None), column[-1])
            losses.append(None if lost is None else sign * lost)
        return _mean(losses)

    def forward_transfer(self) -> float | None:
        """FWT: mean over i >= 1 of R[i-1][i] - before[i]: what earlier tasks did for one not yet trained.

        None without the row before, or where tasks to come were not evaluated.
        """
        if self.before is None:
            return None
        pairs = [(self.after[task - 1][task], self.before[task]) for task in range(1, len(self.after))]
        return _mean(difference(ahead, start) for ahead, start in pairs)

    def _diagonal(self) -> Row:
        return tuple(row[index] for index, row in enumerate(self.after))

    def _backward_transfer(self, stage: int, num_tasks: int) -> float | None:
        if stage < 0:
            return None
        diagonal = self._diagonal()
        return _mean(difference(self.after[stage][task], diagonal[task]) for task in range(num_tasks))

    def to_json(self) -> dict[str, Any]:
        """before and after as JSON-ready rows."""
        return {
            "before": None if self.before is None else row_to_json(self.before),
            "after": [row_to_json(row) for row in self.after],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], higher_is_better: bool) -> "Measure":
        """The measure that to_json wrote."""
        before = None if values["before"] is None else row_from_json(values["before"])
        return cls(tuple(row_from_json(row) for row in values["after"]), before, higher_is_better)


def difference(first: float | None, second: float | None) -> float | None:
    """first - second, None where either is."""
    return None if first is None or second is None else first - second


def row_to_json(row: Sequence[float | None]) -> list[float | str | None]:
    """row with inf and nan, which JSON does not have, as text that float() reads back."""
    return [value if value is None or isfinite(value) else str(value) for value in row]


def row_from_json(values: Sequence[float | str | None]) -> Row:
    """The row that row_to_json wrote."""
    return tuple(None if value is None else float(value) for value in values)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
