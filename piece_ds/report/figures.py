"""Which figures a set of runs has: their names, captions and PNG bytes."""

from collections.abc import Sequence
from math import isfinite

from piece_ds.report.heat_maps import mask_heat_map, overlap_heat_map, result_heat_map
from piece_ds.report.lines import Values, stream_figure, training_figure
from piece_ds.report.page import ReportFigure
from piece_ds.report.results import RunResults

SCORE_PANEL = "score, mean of the tasks seen"


def make_figures(runs: Sequence[RunResults]) -> list[ReportFigure]:
    """All figures that runs have data for: comparisons of the runs first, then those of each run."""
    figures = [*_stream_figures(runs), *_training_figures(runs)]
    for index, run in enumerate(runs):
        figures += _run_figures(run, f"{index}-{_file_stem(run.name)}")
    return figures


def _stream_figures(runs: Sequence[RunResults]) -> list[ReportFigure]:
    """Overall performance and general loss along the stream; runs of other tasks than the first run's are left out."""
    alike = [run for run in runs if run.tasks == runs[0].tasks]
    scores: dict[str, Values] = {
        run.name: [None, *(run.matrix.score.overall(stage) for stage in range(len(run.matrix.score.after)))]
        for run in alike
    }
    losses: dict[str, Values] = {
        run.name: [None, *(run.matrix.loss.overall(stage) for stage in range(len(run.matrix.loss.after)))]
        for run in alike
    }
    general: dict[str, Values] = {run.name: [run.matrix.general_loss_before, *run.matrix.general_loss] for run in alike}
    candidates = {
        SCORE_PANEL: scores,
        "loss, mean of the tasks seen": losses,
        "loss on general text": general,
    }
    panels = {title: of_run for title, of_run in candidates.items() if any(map(_has_values, of_run.values()))}
    if SCORE_PANEL in panels:
        panels.pop("loss, mean of the tasks seen", None)
    if not panels:
        return []
    caption = (
        "Performance on the tasks seen so far and loss on text that no task trains, before the stream and after "
        "each task: what is learned, and what it costs in general ability."
    )
    return [
        ReportFigure("stream.png", caption, stream_figure(panels, ["before", *runs[0].tasks], shares=[SCORE_PANEL]))
    ]


def _training_figures(runs: Sequence[RunResults]) -> list[ReportFigure]:
    alike = [run for run in runs if run.tasks == runs[0].tasks]
    losses = {run.name: run.training_losses for run in alike}
    if not any(points for of_task in losses.values() for points in of_task.values()):
        return []
    caption = "Training loss over the optimizer steps of the stream; a dotted line is the start of a task."
    return [ReportFigure("training.png", caption, training_figure(losses, runs[0].tasks))]


def _run_figures(run: RunResults, stem: str) -> list[ReportFigure]:
    matrix, figures = run.matrix, []
    for name, measure, ends, form in (
        (matrix.score_name, matrix.score, (0.0, 1.0), lambda value: f"{100 * value:.0f}"),
        ("loss", matrix.loss, (None, None), "{:.2f}".format),
    ):
        rows = [*([measure.before] if measure.before else []), *measure.after]
        names = [*(["before"] if measure.before else []), *(f"after {task}" for task in run.tasks)][: len(rows)]
        if any(map(_has_values, rows)):
            unit = "nats per answer token" if name == "loss" else "%"
            png = result_heat_map(rows, names, run.tasks, f"{run.name}: {name} ({unit})", ends, form)
            caption = f"Result matrix of {run.name}, {name}: a row is a moment of the stream, a column a task."
            figures.append(ReportFigure(f"{stem}-{name}.png", caption, png))
    for index, (task, counts) in enumerate(run.masks.items()):
        caption = f"Where {run.name} selected weights for {task}, as shares of all it selected."
        png = mask_heat_map(counts, f"{run.name}: weights selected for {task}")
        figures.append(ReportFigure(f"{stem}-mask-{index:02d}.png", caption, png))
    if len(run.overlaps) == len(run.masks) > 1:
        caption = f"How much the masks of two tasks share in {run.name}: shared / united selected weights."
        png = overlap_heat_map(run.overlaps, list(run.masks), f"{run.name}: overlap of masks")
        figures.append(ReportFigure(f"{stem}-overlap.png", caption, png))
    return figures


def _has_values(values: Values) -> bool:
    return any(value is not None and isfinite(value) for value in values)


def _file_stem(name: str) -> str:
    """name with everything but ASCII letters, digits, dots and hyphens as hyphens."""
    kept = [letter if letter.isascii() and (letter.isalnum() or letter in ".-") else "-" for letter in name]
    return "".join(kept).strip("-.") or "run"
