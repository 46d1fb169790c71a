"""The result matrix: everything that was measured along a stream of tasks, growing row by row as tasks are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from piece_ds.evaluation.measure import FIGURES, Measure, Row, difference, row_from_json, row_to_json

ACCURACY, LOSS = "accuracy", "loss"  # metrics of tasks; the others are named in scorers.py


@dataclass(frozen=True)
class ResultMatrix:
    """All measures of a stream of tasks, as far as it has come.

    Attributes:
        tasks: names, in the order of training.
        metrics: per task what its score is: "accuracy", "(BLEU-4 + ROUGE-L) / 2", "edit similarity", or "loss" where
            nothing is generated.
        score: in [0, 1], higher is better; None where the metric is "loss".
        loss: nats per answer token.
        general_loss: nats per token of text that no task trains, after each task.
        general_loss_before: the same before any task.
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
        """What the scores are called together: "accuracy" where all of them are, else "score"."""
        return ACCURACY if set(self.metrics) <= {ACCURACY, LOSS} else "score"

    @property
    def accuracy(self) -> Measure:
        """The scores that are accuracies; None for the other tasks."""
        kept = [metric == ACCURACY for metric in self.metrics]

        def only(row: Row) -> Row:
            return tuple(value if keep else None for value, keep in zip(row, kept, strict=True))

        before = None if self.score.before is None else only(self.score.before)
        return Measure(tuple(map(only, self.score.after)), before)

    def with_before(
        self, score: Mapping[str, float | None], loss: Mapping[str, float | None], general_loss: float | None = None
    ) -> "ResultMatrix":
        """This matrix with the row before any task; tasks that a mapping leaves out were not evaluated."""
        return replace(
            self,
            score=replace(self.score, before=self._row(score)),
            loss=replace(self.loss, before=self._row(loss)),
            general_loss_before=general_loss,
        )

    def with_row(
        self, score: Mapping[str, float | None], loss: Mapping[str, float | None], general_loss: float | None = None
    ) -> "ResultMatrix":
        """This matrix with the row of the next trained task; tasks that a mapping leaves out were not evaluated.

        Raises:
            ValueError: all tasks have their row, or a name is no task.
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
        """The derived figures by name: of scores, the accuracies among them, losses; the change of the general loss."""
        figures: dict[str, float | None] = {}
        for name, measure in (("score", self.score), ("accuracy", self.accuracy), ("loss", self.loss)):
            for figure in FIGURES:
                figures[f"{name}_{figure}"] = getattr(measure, figure)()
        last = self.general_loss[-1] if self.general_loss else None
        return {**figures, "general_loss_change": difference(last, self.general_loss_before)}

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; what was not evaluated is null. Reading it back gives an equal matrix."""
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
        """The matrix that to_json wrote; accuracy and summary are derived. (Files written before there were other
        scores have accuracies alone.)"""
        general = values["general_loss"]
        return cls(
            tasks=tuple(values["tasks"]),
            metrics=tuple(values["metrics"]),
            score=Measure.from_json(values.get("score", values["accuracy"]), higher_is_better=True),
            loss=Measure.from_json(values["loss"], higher_is_better=False),
            general_loss=row_from_json(general["after"]),
            general_loss_before=row_from_json([general["before"]])[0],
        )

    def _row(self, results: Mapping[str, float | None]) -> Row:
        unknown = sorted(set(results) - set(self.tasks))
        if unknown:
            raise ValueError(f"no task {unknown[0]!r} in the matrix of {', '.join(self.tasks)}")
        return tuple(results.get(task) for task in self.tasks)
