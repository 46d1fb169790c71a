"""Which figures a set of runs has: their names, captions and PNG bytes."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

from piece_ds.evaluation.matrix import Measure
from piece_ds.report.heat_maps import MAX_PANELS, mask_heat_maps, overlap_heat_map, result_heat_map
from piece_ds.report.html import ReportFigure
from piece_ds.report.lines import Values, stream_figure, training_figure
from piece_ds.report.results import RunResults
from piece_ds.report.validation import kept_points, validation_losses

SCORE_PANEL = "score, mean of the tasks seen"
LOSS_PANEL = "loss, mean of the tasks seen"
GENERAL_PANEL = "loss on general text"


def make_figures(runs: Sequence[RunResults]) -> list[ReportFigure]:
    """Return all figures that runs have data for: first comparisons of the runs, then those of each run.

    Comparisons show only the runs with the same tasks as the first run.
    """
    # Curves of other tasks would share an axis that means something else.
    alike = {run.name: [run] for run in runs if run.tasks == runs[0].tasks}
    figures = line_figures(alike)
    for index, run in enumerate(runs):
        figures += run_figures(run, f"{index}-{_file_stem(run.name)}")
    return figures


def line_figures(runs: Mapping[str, Sequence[RunResults]], families: Sequence[str] = ()) -> list[ReportFigure]:
    """Return the figures along the stream and of the training loss, with one line per name.

    Args:
        runs: name -> runs with the same tasks, one or several seeds.
        families: what each name belongs to; each family has a colour. Without it, each name is its own family.
    """
    if not runs:
        return []
    tasks = next(iter(runs.values()))[0].tasks
    return [*_stream_figures(runs, tasks, families), *_training_figures(runs, tasks, families)]


def _stream_figures(
    runs: Mapping[str, Sequence[RunResults]], tasks: Sequence[str], families: Sequence[str]
) -> list[ReportFigure]:
    """Return the figure of overall performance and general loss along the stream."""
    measures: dict[str, Callable[[RunResults], Values]] = {
        SCORE_PANEL: lambda run: _overall(run.matrix.score),
        LOSS_PANEL: lambda run: _overall(run.matrix.loss),
        GENERAL_PANEL: lambda run: [run.matrix.general_loss_before, *run.matrix.general_loss],
    }
    panels = {
        title: {name: [measure(run) for run in several] for name, several in runs.items()}
        for title, measure in measures.items()
    }
    panels = {
        title: of_run
        for title, of_run in panels.items()
        if any(_has_values(values) for several in of_run.values() for values in several)
    }

    # Scores tell more than losses, if there are any.
    if SCORE_PANEL in panels:
        panels.pop(LOSS_PANEL, None)
    if not panels:
        return []

    # The caption says only what the figure shows.
    caption = "Performance on the tasks seen so far: what is learned and kept."
    if GENERAL_PANEL in panels:
        caption = (
            "Performance on the tasks seen so far and loss on text that no task trains, before the stream and after "
            "each task: what is learned, and what it costs in general ability."
        )
    png = stream_figure(panels, ["before", *tasks], shares=[SCORE_PANEL], may_be_log=[GENERAL_PANEL], families=families)
    return [ReportFigure("stream.png", caption + _of_seeds(runs), png)]


def _training_figures(
    runs: Mapping[str, Sequence[RunResults]], tasks: Sequence[str], families: Sequence[str]
) -> list[ReportFigure]:
    losses = {name: [run.training_losses for run in several] for name, several in runs.items()}
    if not any(points for several in losses.values() for of_task in several for points in of_task.values()):
        return []

    # Held-out losses of single runs: a mean over seeds would have no step that was kept.
    single = {name: several[0] for name, several in runs.items() if len(several) == 1 and several[0].validation}
    held_out = {name: validation_losses(run) for name, run in single.items()}
    png = training_figure(
        losses, tasks, families, held_out=held_out, kept={name: kept_points(run) for name, run in single.items()}
    )
    caption = "Training loss over the optimizer steps of the stream; a dotted line is the start of a task."
    if single:
        caption += " Dashed: loss on held-out rows; a star is the step that the task ended with."
    return [ReportFigure("training.png", caption + _of_seeds(runs), png)]


def _overall(measure: Measure) -> Values:
    return [None, *(measure.overall(stage) for stage in range(len(measure.after)))]


def _of_seeds(runs: Mapping[str, Sequence[RunResults]]) -> str:
    several = any(len(of_name) > 1 for of_name in runs.values())
    return " Lines are means over seeds, bands go from the lowest to the highest." if several else ""


def run_figures(run: RunResults, stem: str) -> list[ReportFigure]:
    """Return result matrices and masks of one run. File names begin with stem."""
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
    return figures + mask_figures(run, stem)


def mask_figures(run: RunResults, stem: str) -> list[ReportFigure]:
    """Return where the weights of all masks lie, and how much the masks share; nothing for a run without masks."""
    figures = []
    if run.masks:
        caption = (
            f"Where {run.name} selected weights: the share of a module's own weights in each layer, on a logarithmic "
            "scale; white: none selected, grey: no such module."
        )
        shown = some_of(list(run.masks))
        caption += f" {len(shown)} of {len(run.masks)} tasks." if len(shown) < len(run.masks) else ""
        png = mask_heat_maps({task: run.masks[task] for task in shown})
        figures.append(ReportFigure(f"{stem}-masks.png", caption, png))
    if len(run.overlaps) == len(run.masks) > 1:
        caption = f"How much the masks of two tasks share in {run.name}: shared / united selected weights."
        png = overlap_heat_map(run.overlaps, list(run.masks), f"{run.name}: overlap of masks")
        figures.append(ReportFigure(f"{stem}-overlap.png", caption, png))
    return figures


def some_of(names: Sequence[str]) -> list[str]:
    """Return as many names as a figure has panels for, evenly spaced from the first to the last."""
    if len(names) <= MAX_PANELS:
        return list(names)
    return [names[round(place * (len(names) - 1) / (MAX_PANELS - 1))] for place in range(MAX_PANELS)]


def _has_values(values: Values) -> bool:
    return any(value is not None and isfinite(value) for value in values)


def _file_stem(name: str) -> str:
    """Return name with a hyphen for everything but ASCII letters, digits, dots and hyphens."""
    # Names may hold anything; file names should not.
    kept = [letter if letter.isascii() and (letter.isalnum() or letter in ".-") else "-" for letter in name]
    return "".join(kept).strip("-.") or "run"
