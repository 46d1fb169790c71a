"""The result matrix: everything that was measured along a stream of tasks, growing row by row as tasks are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from piece_ds.evaluation.measure import FIGURES, Measure, Row, difference, row_from_json, row_to_json


@dataclass(frozen=True)
class ResultMatrix:
    """All measures of a stream of tasks, as far as it has come.

    Attributes:
        tasks: names, in the order of training.
        accuracy: share of right answers in [0, 1]; None where a task's answers are free text.
        loss: nats per answer token.
        general_loss: nats per token of text that no task trains, after each task.
        general_loss_before: the same before any task.
    """

    tasks: tuple[str, ...]
    accuracy: Measure = field(default_factory=Measure)
    loss: Measure = field(default_factory=lambda: Measure(higher_is_better=False))
    general_loss: Row = ()
    general_loss_before: float | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Per task the name of its main measure: accuracy where it was ever known, else loss."""
        rows = [*self.accuracy.after, *([self.accuracy.before] if self.accuracy.before else [])]
        known = [any(row[task] is not None for row in rows) for task in range(len(self.tasks))]
        return tuple("accuracy" if has_accuracy else "loss" for has_accuracy in known)

    def with_before(
        self, accuracy: Mapping[str, float | None], loss: Mapping[str, float | None], general_loss: float | None = None
    ) -> "ResultMatrix":
        """This matrix with the row before any task; tasks that a mapping leaves out were not evaluated."""
        return replace(
            self,
            accuracy=replace(self.accuracy, before=self._row(accuracy)),
            loss=replace(self.loss, before=self._row(loss)),
            general_loss_before=general_loss,
        )

    def with_row(
        self, accuracy: Mapping[str, float | None], loss: Mapping[str, float | None], general_loss: float | None = None
    ) -> "ResultMatrix":
        """This matrix with the row of the next trained task; tasks that a mapping leaves out were not evaluated.

        Raises:
            ValueError: all tasks have their row, or a name is no task.
        """
        if len(self.loss.after) == len(self.tasks):
            raise ValueError(f"all {len(self.tasks)} tasks have their row already")
        return replace(
            self,
            accuracy=replace(self.accuracy, after=(*self.accuracy.after, self._row(accuracy))),
            loss=replace(self.loss, after=(*self.loss.after, self._row(loss))),
            general_loss=(*self.general_loss, general_loss),
        )

    def summary(self) -> dict[str, float | None]:
        """The derived figures by name: those of accuracy, those of loss, and the change of the general loss."""
        figures: dict[str, float | None] = {}
        for name, measure in (("accuracy", self.accuracy), ("loss", self.loss)):
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
        """The matrix that to_json wrote; metrics and summary are derived, not read."""
        general = values["general_loss"]
        return cls(
            tasks=tuple(values["tasks"]),
            accuracy=Measure.from_json(values["accuracy"], higher_is_better=True),
            loss=Measure.from_json(values["loss"], higher_is_better=False),
            general_loss=row_from_json(general["after"]),
            general_loss_before=row_from_json([general["before"]])[0],
        )

    def _row(self, results: Mapping[str, float | None]) -> Row:
        unknown = sorted(set(results) - set(self.tasks))
        if unknown:
            raise ValueError(f"no task {unknown[0]!r} in the matrix of {', '.join(self.tasks)}")
        return tuple(results.get(task) for task in self.tasks)
