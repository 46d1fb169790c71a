"""The result matrix: everything measured along a stream of tasks. It grows by one row per trained task."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        after: row i is R[i][.], taken after task i; one row per trained task, each T long.
        before: the model before any task, T long; None if it was not evaluated.
        higher_is_better: True for accuracy, False for a loss. Differences keep the measure's own sign: a backward
            transfer of +0.3 is good for accuracy and bad for a loss. Only forgetting is always positive if ability was
            lost.
    """

    after: tuple[Row, ...] = ()
    before: Row | None = None
    higher_is_better: bool = True

    def overall(self, stage: int | None = None) -> float | None:
        """Return OP, the mean over tasks j <= stage of R[stage][j]; stage None means the last trained task."""
        stage = len(self.after) - 1 if stage is None else stage
        return _mean(self.after[stage][: stage + 1]) if stage >= 0 else None

    def learning(self) -> float | None:
        """Return the mean of the diagonal R[i][i]: each task right after it was learned."""
        return _mean(self._diagonal())

    def backward_transfer(self) -> float | None:
        """Return BWT, the mean over i < t of R[t][i] - R[i][i], t the last trained task.

        None for fewer than two tasks.
        """
        return self._backward_transfer(stage=len(self.after) - 1, num_tasks=len(self.after) - 1)

    def backward_transfer_authors(self) -> float | None:
        """Return BWT as the method's authors compute it, without the last task.

        With T trained tasks, stage T-2 is the last that counts. The mean over i <= T-2 of R[T-2][i] - R[i][i] includes
        the term i = T-2, which is zero by definition. None for fewer than two tasks.
        """
        return self._backward_transfer(stage=len(self.after) - 2, num_tasks=len(self.after) - 1)

    def forgetting(self) -> float | None:
        """Return the mean over i < t of (best of R[l][i], i <= l < t) - R[t][i]; for a loss, R[t][i] - the lowest.

        It is positive if ability was lost. None for fewer than two tasks.
        """
        last = len(self.after) - 1
        # For a loss the best value is the lowest, and a rise is what was lost.
        sign, best = (1.0, max) if self.higher_is_better else (-1.0, min)
        losses: list[float | None] = []
        for task in range(last):
            column = [row[task] for row in self.after[task:]]
            earlier = [value for value in column[:-1] if value is not None]
            lost = difference(best(earlier, default=None), column[-1])
            losses.append(None if lost is None else sign * lost)
        return _mean(losses)

    def forward_transfer(self) -> float | None:
        """Return FWT, the mean over i >= 1 of R[i-1][i] - before[i]: what earlier tasks did for one not yet trained.

        None without the row before, or if later tasks were not evaluated.
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
        """Return before and after as JSON-ready rows."""
        return {
            "before": None if self.before is None else row_to_json(self.before),
            "after": [row_to_json(row) for row in self.after],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], higher_is_better: bool) -> "Measure":
        """Return the measure that to_json() wrote."""
        before = None if values["before"] is None else row_from_json(values["before"])
        return cls(tuple(row_from_json(row) for row in values["after"]), before, higher_is_better)


def difference(first: float | None, second: float | None) -> float | None:
    """Return first - second; None if either is None."""
    return None if first is None or second is None else first - second


def row_to_json(row: Sequence[float | None]) -> list[float | str | None]:
    """Return row with inf and nan, which JSON does not have, as text that float() reads back."""
    return [value if value is None or isfinite(value) else str(value) for value in row]


def row_from_json(values: Sequence[float | str | None]) -> Row:
    """Return the row that row_to_json() wrote."""
    return tuple(None if value is None else float(value) for value in values)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


ACCURACY, LOSS = "accuracy", "loss"  # metrics of tasks; the others are named in scorers.py


@dataclass(frozen=True)
class ResultMatrix:
    """All measures of a stream of tasks so far.

    Attributes:
        tasks: names, in the order of training.
        metrics: per task, the name of its score: "accuracy", "(BLEU-4 + ROUGE-L) / 2", "edit similarity", or "loss" if
            nothing is generated.
        score: in [0, 1], higher is better; None for tasks with the metric "loss".
        loss: nats per answer token.
        general_loss: nats per token of text that no task trains, after each task.
        general_loss_before: the same before any task.
    Raises:
        ValueError: there are not as many metrics as tasks.
    """

    tasks: tuple[str, ...]
    metrics: tuple[str, ...]
    score: Measure = field(default_factory=Measure)
    loss: Measure = field(default_factory=lambda: Measure(higher_is_better=False))
    general_loss: Row = ()
    general_loss_before: float | None = None

    def __post_init__(self) -> None:
        if len(self.metrics) != len(self.tasks):
            raise ValueError(f"{len(self.metrics)} metrics for {len(self.tasks)} tasks")

    @property
    def score_name(self) -> str:
        """Common name of the scores: "accuracy" if all of them are, else "score"."""
        return ACCURACY if set(self.metrics) <= {ACCURACY, LOSS} else "score"

    @property
    def accuracy(self) -> Measure:
        """Only the scores that are accuracies; None for the other tasks."""
        kept = [metric == ACCURACY for metric in self.metrics]

        def only(row: Row) -> Row:
            return tuple(value if keep else None for value, keep in zip(row, kept, strict=True))

        before = None if self.score.before is None else only(self.score.before)
        return Measure(tuple(map(only, self.score.after)), before)

    def with_before(
        self, score: Mapping[str, float | None], loss: Mapping[str, float | None], general_loss: float | None = None
    ) -> "ResultMatrix":
        """Return this matrix with the row before any task. Tasks that a mapping leaves out were not evaluated."""
        return replace(
            self,
            score=replace(self.score, before=self._row(score)),
            loss=replace(self.loss, before=self._row(loss)),
            general_loss_before=general_loss,
        )

    def with_before_of(self, other: "ResultMatrix") -> "ResultMatrix":
        """Return this matrix with the row before any task of another one of the same tasks."""
        return replace(
            self,
            score=replace(self.score, before=other.score.before),
            loss=replace(self.loss, before=other.loss.before),
            general_loss_before=other.general_loss_before,
        )

    def with_row(
        self, score: Mapping[str, float | None], loss: Mapping[str, float | None], general_loss: float | None = None
    ) -> "ResultMatrix":
        """Return this matrix with the row of the next trained task. Tasks that a mapping leaves out were not evaluated.

        Raises:
            ValueError: all tasks have their row already, or a name is no task.
        """
        if len(self.loss.after) == len(self.tasks):
            raise ValueError(f"all {len(self.tasks)} tasks have their row already")
        return replace(
            self,
            score=replace(self.score, after=(*self.score.after, self._row(score))),
            loss=replace(self.loss, after=(*self.loss.after, self._row(loss))),
            general_loss=(*self.general_loss, general_loss),
        )

    def summary(self) -> dict[str, float | None]:
        """Return the derived figures by name.

        They are the FIGURES of all scores, of the accuracies among them and of the losses, and the change of the
        general loss.
        """
        figures: dict[str, float | None] = {}
        for name, measure in (("score", self.score), ("accuracy", self.accuracy), ("loss", self.loss)):
            for figure in FIGURES:
                figures[f"{name}_{figure}"] = getattr(measure, figure)()
        last = self.general_loss[-1] if self.general_loss else None
        return {**figures, "general_loss_change": difference(last, self.general_loss_before)}

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values; what was not evaluated is null. from_json() gives an equal matrix."""
        summary = self.summary()
        return {
            "tasks": list(self.tasks),
            "metrics": list(self.metrics),
            "score": self.score.to_json(),
            "accuracy": self.accuracy.to_json(),
            "loss": self.loss.to_json(),
            "general_loss": {
                "before": row_to_json([self.general_loss_before])[0],
                "after": row_to_json(self.general_loss),
            },
            "summary": dict(zip(summary, row_to_json(list(summary.values())), strict=True)),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ResultMatrix":
        """Return the matrix that to_json() wrote. Accuracy and summary are derived again.

        Files written before there were other scores have only accuracies.
        """
        general = values["general_loss"]
        return cls(
            tasks=tuple(values["tasks"]),
            metrics=tuple(values["metrics"]),
            score=Measure.from_json(values.get("score") or values["accuracy"], higher_is_better=True),
            loss=Measure.from_json(values["loss"], higher_is_better=False),
            general_loss=row_from_json(general["after"]),
            general_loss_before=row_from_json([general["before"]])[0],
        )

    def _row(self, results: Mapping[str, float | None]) -> Row:
        unknown = sorted(set(results) - set(self.tasks))
        if unknown:
            raise ValueError(f"no task {unknown[0]!r} in the matrix of {', '.join(self.tasks)}")
        return tuple(results.get(task) for task in self.tasks)
