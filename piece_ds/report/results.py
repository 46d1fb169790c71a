"""What one run found: the content of its results.json, from which every report is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report.results_schema import Results
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import checked, read_json

FORMAT = "piece-results"
VERSION = 1

# Text that no task trains, beside the names of tasks.
GENERAL_TEXT = "general text"

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]  # layer -> module type -> {"selected", "total"}


@dataclass(frozen=True)
class RunResults:
    """One run of a stream of tasks.

    Attributes:
        name: of the run in tables and figures, such as "piece-s 0.1 %".
        method: the method's flag value.
        ratio: selected elements / elements of the model, in (0, 1].
        matrix: results on every task after every task. It also holds the tasks' names and order.
        masks: task -> layer -> module type -> selected and total elements. Tasks without a mask are left out.
        overlaps: Jaccard index of every two masks, in [0, 1], in the order of masks.
        measures: moment ("before", "after TASK") -> task -> measures besides its score, in [0, 1].
        ability: moment -> measure of general ability -> value.
        divergence: moment -> task or "general text" -> KL(base model || model) on its held-out rows, nats a token.
        logs: task -> the trainer's log. Entries with "step" and "loss" make the training curve.
        cost: task -> what was measured, by names that say the unit ("train_seconds", "peak_bytes").
        settings: flags worth showing, as JSON values.
        changes: task -> kind of tensor -> number of selected values, and of those that differ after the task.
        rows: task -> number of rows that it is evaluated on.
        forgetting: task -> "delta_scale", the "curve" it was chosen from, and losses of both halves of the general
            text.
        validation: task -> "curve" of the evaluations while it trained, "best_step", "used_step" (whose weights it ends
            with), "last_step", "metric", "stopped_early" and the number of "rows".
        notes: what a reader must know, in sentences.
    """

    name: str
    method: str
    ratio: float
    matrix: ResultMatrix
    masks: Mapping[str, Counts] = field(default_factory=dict)
    overlaps: Sequence[Sequence[float]] = ()
    measures: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    ability: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    divergence: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    logs: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    cost: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    forgetting: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    validation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    rows: Mapping[str, int] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in the order of training."""
        return self.matrix.tasks

    @property
    def selected_counts(self) -> dict[str, tuple[int, int]]:
        """Task -> (selected, total) elements of its mask."""
        cells = {
            task: [cell for modules in counts.values() for cell in modules.values()]
            for task, counts in self.masks.items()
        }
        return {
            task: (sum(cell["selected"] for cell in of_task), sum(cell["total"] for cell in of_task))
            for task, of_task in cells.items()
        }

    @property
    def training_losses(self) -> dict[str, list[tuple[int, float]]]:
        """Task -> (step, loss) points of its training curve, with steps counted from the task's start."""
        return {
            task: [(int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry and "step" in entry]
            for task, log in self.logs.items()
        }

    @property
    def general_divergence(self) -> float | None:
        """KL(base model || model) on general text after the last trained task; None if it was not measured."""
        return list(self.divergence.values())[-1].get(GENERAL_TEXT) if self.divergence else None

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values. from_json() gives equal results."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "method": self.method,
            "ratio": self.ratio,
            "finished": len(self.matrix.loss.after),
            "matrix": self.matrix.to_json(),
            "measures": self.measures,
            "ability": self.ability,
            **({"divergence": self.divergence} if self.divergence else {}),
            "masks": self.masks,
            "overlaps": self.overlaps,
            "cost": self.cost,
            "logs": self.logs,
            "settings": self.settings,
            **({"forgetting": self.forgetting} if self.forgetting else {}),
            **({"validation": self.validation} if self.validation else {}),
            "notes": self.notes,
            "rows": self.rows,
            "changes": self.changes,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], name: str | None = None) -> "RunResults":
        """Return the results in the content of a results.json.

        Args:
            values: from to_json(). name, measures, ability, divergence, settings, notes, rows, changes, forgetting and
                validation may be absent.
            name: name to give the run; None means its own, or else its method.
        Raises:
            UserError: values have another format or version, or a part is missing or of the wrong form.
        """
        content = checked(values, Results, "results", "run again", strict=True).model_dump(exclude_unset=True)
        # Required parts fail above; optional ones keep the defaults of older files.
        parts = {part: content[part] for part in ("method", "ratio", "masks", "overlaps", "logs", "cost")}
        known = ("measures", "ability", "divergence", "settings", "notes", "rows", "changes", "forgetting")
        optional = {part: content[part] for part in (*known, "validation") if part in content}
        name = name or content.get("name") or str(content["method"])
        return cls(name=name, matrix=ResultMatrix.from_json(content["matrix"]), **parts, **optional)


def read_results(path: Path | str, name: str | None = None) -> RunResults:
    """Return the results in a results.json.

    Args:
        path: of the file.
        name: as in RunResults.from_json().
    Raises:
        UserError: the file is missing, no JSON, or of another format; the message names it.
    """
    content = read_json(path, dict[str, Any], "results", "a run writes it before its first task; run again")
    try:
        return RunResults.from_json(content, name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
