"""Which step of each task a run has kept, and how the task's held-out rows judged the steps."""

from collections.abc import Mapping, Sequence
from typing import Any

from piece_ds.report.grids import Grid, nats, percent, signed_nats
from piece_ds.report.results import RunResults

Points = list[tuple[int, float]]


def validation_grid(run: RunResults) -> Grid:
    """Return one row a task: the step that is kept, and what was measured at it and at the last one."""
    found = run.validation
    measures = [name for name in _FORMS if any(name in entry for task in found.values() for entry in task["curve"])]
    header = ("task", "kept by", "step kept", "last step", *(f"{_LABELS[n]} {at}" for n in measures for at in _AT))
    rows = []
    for task, of_task in found.items():
        kept, last = (_at(of_task["curve"], of_task[step]) for step in ("used_step", "last_step"))
        cells = [_FORMS[name](entry.get(name)) for name in measures for entry in (kept, last)]
        end = f"{of_task['last_step']:,}" + (" (stopped early)" if of_task["stopped_early"] else "")
        rows.append((task, _rule(of_task), f"{of_task['used_step']:,}", end, *cells))
    return Grid(f"{run.name}: steps judged on held-out rows", header, tuple(rows), num_text_columns=2)


def validation_losses(run: RunResults) -> dict[str, Points]:
    """Return task -> (step, loss) points of its held-out rows, with steps counted from the task's start."""
    return {
        task: [(entry["step"], entry["loss"]) for entry in of_task["curve"] if entry["loss"] is not None]
        for task, of_task in run.validation.items()
    }


def kept_points(run: RunResults) -> dict[str, tuple[int, float]]:
    """Return task -> (step, held-out loss) of the step that is kept, for tasks that were evaluated there."""
    points = {
        task: (of_task["used_step"], _at(of_task["curve"], of_task["used_step"]).get("loss"))
        for task, of_task in run.validation.items()
    }
    return {task: (step, loss) for task, (step, loss) in points.items() if loss is not None}


_AT = ("then", "at the end")
_FORMS = {"loss": nats, "score": percent, "general_rise": signed_nats}
_LABELS = {"loss": "loss", "score": "score", "general_rise": "rise of general loss"}


def _rule(of_task: Mapping[str, Any]) -> str:
    chosen = of_task["used_step"] == of_task["best_step"]
    return str(of_task["metric"]).replace("_", " ") if chosen else "order: the last one"


def _at(curve: Sequence[Mapping[str, Any]], step: int) -> Mapping[str, Any]:
    """Return the evaluation after a step, or nothing if there was none."""
    return next((entry for entry in curve if entry["step"] == step), {})
