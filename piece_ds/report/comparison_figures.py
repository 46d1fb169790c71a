"""Figures of a comparison of groups of runs."""

from collections.abc import Sequence
from math import isfinite
from statistics import fmean

from piece_ds.report.comparison_table import Figure, figures_of, measured_by_score
from piece_ds.report.frontier import FrontierPoint, frontier_figure
from piece_ds.report.groups import Group, shown
from piece_ds.report.heat_maps import result_heat_maps
from piece_ds.report.html import ReportFigure
from piece_ds.report.run_figures import line_figures, mask_figures, some_of


def comparison_figures(groups: Sequence[Group]) -> list[ReportFigure]:
    """Return all figures that groups have data for.

    Masks are drawn only for a single group: each run's own report has them.
    """
    figures = line_figures({group.label: group.runs for group in groups}, [group.name for group in groups])
    figures += [*_frontier(groups), *_matrices(groups)]
    return figures + (mask_figures(groups[0].first, "run") if len(groups) == 1 else [])


def _matrices(groups: Sequence[Group]) -> list[ReportFigure]:
    """Return result matrices side by side, on one colour scale."""
    score = measured_by_score(groups)
    shown = some_of([group.label for group in groups])

    # Choose what is shown: as many groups as a figure has room for.
    measures = {
        group.label: [run.matrix.score if score else run.matrix.loss for run in group.runs]
        for group in groups
        if group.label in shown
    }
    with_before = all(measure.before is not None for several in measures.values() for measure in several)

    # Average over seeds, cell by cell.
    panels = {}
    for label, several in measures.items():
        matrices = [[*([measure.before or ()] if with_before else []), *measure.after] for measure in several]
        panels[label] = [[_mean(cell) for cell in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
    num_rows, tasks = max(map(len, panels.values())), groups[0].first.tasks
    if num_rows == 0:
        return []

    # Draw them, and say in the caption what was left out.
    names = [*(["before"] if with_before else []), *(f"after {task}" for task in tasks)][:num_rows]
    if score:
        png = result_heat_maps(panels, names, tasks, (0.0, 1.0), lambda value: f"{100 * value:.0f}")
    else:
        png = result_heat_maps(panels, names, tasks)
    caption = (
        f"Result matrices, {'scores in %' if score else 'losses in nats per answer token'}, on one colour scale: a row "
        "is a moment of the stream, a column a task."
    )
    caption += f" {len(shown)} of {len(groups)} settings." if len(shown) < len(groups) else ""
    caption += " Means over seeds." if any(len(group.runs) > 1 for group in groups) else ""
    return [ReportFigure("matrices.png", caption, png)]


def _frontier(groups: Sequence[Group]) -> list[ReportFigure]:
    """Return learned against kept, if groups differ in learning rate or ratio.

    Groups behind the furthest are left out.
    """
    # Runs that have come less far have learned fewer tasks: their means say something else.
    furthest = max(group.num_finished for group in groups)
    groups = [group for group in groups if group.num_finished == furthest]
    rates = {group.settings.get("learning_rate") for group in groups}
    if furthest == 0 or (len(rates) < 2 and len({group.first.ratio for group in groups}) < 2):
        return []

    # Collect what was learned, and what was kept: on the tasks, and in general.
    score, figures = measured_by_score(groups), figures_of(groups)
    learned, overall, general = (
        next(figure for name, (figure, _) in figures.items() if name.endswith(end))
        for end in ("learned", "OP", "general loss after")
    )
    panels = [
        ("kept: mean of all tasks at the end" + ("" if score else " (loss)"), overall, not score),
        ("loss on general text at the end", general, True),
    ]
    panels = [panel for panel in panels if any(panel[1](run) is not None for group in groups for run in group.runs)]
    kept = [figure for _, figure, _ in panels]
    points = [point for group in _along_lines(groups) if (point := _point(group, groups, learned, kept))]
    if len(points) < 2 or not panels:
        return []
    x_label = "learned: mean of tasks right after each" + ("" if score else " (loss)")

    # Draw it.
    png = frontier_figure(points, x_label, [title for title, *_ in panels], not score, [loss for *_, loss in panels])
    caption = (
        "The frontier of learning against keeping, labelled with what changes along a line: at equal learning the "
        "higher point keeps more. Axes of losses are turned round, so that up and to the right is better."
    )
    caption += " Pale signs are single seeds." if any(len(group.runs) > 1 for group in groups) else ""
    return [ReportFigure("frontier.png", caption, png)]


def _point(group: Group, groups: Sequence[Group], learned: Figure, kept: Sequence[Figure]) -> FrontierPoint | None:
    """Return where a group lies; None if nothing that it learned was measured."""
    x = _mean([learned(run) for run in group.runs])
    if x is None:
        return None
    line, label = _line_and_label(group, groups)
    seeds = [(at, tuple(figure(run) for figure in kept)) for run in group.runs if (at := learned(run)) is not None]
    return FrontierPoint(line, label, x, tuple(_mean([figure(run) for run in group.runs]) for figure in kept), seeds)


def _line_and_label(group: Group, groups: Sequence[Group]) -> tuple[str, str]:
    """Return the name of a group's line, and what changes along it.

    That is the learning rate or, if all rates are equal, the ratio.
    """
    of_method = [other for other in groups if other.first.method == group.first.method]
    rates = {shown(other.settings.get("learning_rate")) for other in of_method}
    ratio, rate = f"{100 * group.first.ratio:g} %", group.settings.get("learning_rate")
    # What else differs within the method must be part of the line's name.
    others = [
        f"{name} {shown(value)}"
        for name, value in group.settings.items()
        if name != "learning_rate" and len({repr(other.settings[name]) for other in of_method}) > 1
    ]
    if len(rates) > 1:
        return ", ".join([group.name, *others]), shown(rate)
    return ", ".join([group.first.method, *others]), ratio


def _along_lines(groups: Sequence[Group]) -> list[Group]:
    """Return groups of one name together, sorted by learning rate and ratio."""
    names = list(dict.fromkeys(group.name for group in groups))

    def place(group: Group) -> tuple[int, float, float]:
        rate = group.settings.get("learning_rate")
        return names.index(group.name), float(rate) if isinstance(rate, int | float) else 0.0, group.first.ratio

    return sorted(groups, key=place)


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the finite values; None if there are none."""
    known = [value for value in values if value is not None and isfinite(value)]
    return fmean(known) if known else None
