"""Figures of what changes along the stream: performance, general loss, training loss. Plain values in, PNG out.

A run may be given several times, once per seed. Its line is then the mean, and a band spans the lowest to the highest.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from math import isfinite
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from piece_ds.report.legend import legend_below, legend_height
from piece_ds.report.style import (
    GREY,
    LineStyle,
    figure_style,
    label_ticks,
    line_styles,
    log_if_wide,
    new_axes,
    not_less_than_noise,
    png,
    shortened,
)

Values = Sequence[float | None]
Points = Sequence[tuple[int, float]]
MAX_PLAIN_POINTS = 60  # more points are smoothed to show the trend, with the raw curve faint behind
SMOOTHING_PARTS = 30  # half a smoothing window is this part of a curve
MIN_NAME_INCHES = 1.0  # of a task above its part of the training curve


def stream_figure(
    panels: Mapping[str, Mapping[str, Sequence[Values]]],
    moments: Sequence[str],
    shares: Collection[str] = (),
    may_be_log: Collection[str] = (),
    families: Sequence[str] = (),
) -> bytes:
    """Draw measures along the stream, one panel each, with one line per run.

    Args:
        panels: y label, which is the panel's title -> run -> for each repetition the value at each moment; None if not
            evaluated.
        moments: names on the x axis, such as "before" and the tasks. A panel begins with the first that has a value.
        shares: panels whose axis spans 0 to 100 %, so that a small difference looks small.
        may_be_log: panels whose axis is logarithmic if one diverged run would flatten the others.
        families: what each run belongs to; runs of one family share a colour. Without it, each run is its own family.
    Returns:
        PNG bytes.
    """
    names = list(next(iter(panels.values()), {}))
    with figure_style():
        width = max((1.6 + 0.55 * max(len(moments), 5)) * len(panels), 5.5)
        figure, all_axes = new_axes(width, 3.3 + legend_height(names), num_panels=max(len(panels), 1))
        for axes, (title, runs) in zip(all_axes, panels.items(), strict=False):
            # One line per run, from the first moment with a value.
            curves = [_mean_and_band([list(enumerate(values)) for values in several]) for several in runs.values()]
            first = min((points[0][0] for points, _ in curves if points), default=0)
            for run, (points, band), look in zip(runs, curves, line_styles(families or names), strict=True):
                axes.plot(*_columns(points), label=run, marker=look.marker, **look.line)
                _fill(axes, band, look)

            # Axes: shares are comparable across figures, losses never zoom in on noise.
            label_ticks(axes, moments)
            axes.set_xlim(first - 0.3, len(moments) - 0.7)  # after the ticks, which widen it
            if title in shares:
                axes.set_ylim(-0.02, 1.02)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            else:
                values = [y for points, band in curves for _, *ys in (*points, *band) for y in ys]
                not_less_than_noise(axes, values)
                title += log_if_wide(axes, values) if title in may_be_log else ""
            axes.set_title(title)
        legend_below(figure, all_axes[0], names)
        return png(figure)


def training_figure(
    losses: Mapping[str, Sequence[Mapping[str, Points]]],
    tasks: Sequence[str],
    families: Sequence[str] = (),
    *,
    held_out: Mapping[str, Mapping[str, Points]] | None = None,
    kept: Mapping[str, Mapping[str, tuple[int, float]]] | None = None,
) -> bytes:
    """Draw training loss over all steps of the stream, task after task, with one line per run.

    Args:
        losses: run -> for each repetition, task -> (step within the task, loss) in step order.
        tasks: in the order of training.
        families: as in stream_figure().
        held_out: run -> task -> the same of its held-out rows; drawn as a dashed line of the run's colour.
        kept: run -> task -> the point of the step that the task ended with; drawn as a star.
    Returns:
        PNG bytes. Thin lines separate the tasks. Long curves are smoothed, with the raw values faint behind.
    """

    # A task starts where the longest curve of the one before ends.
    logs = [log for several in losses.values() for log in several]
    lengths = [max((points[-1][0] for log in logs if (points := log.get(task))), default=0) for task in tasks]
    starts = [0, *accumulate(lengths)]
    names = list(losses)
    with figure_style():
        figure, (axes,) = new_axes(max(7.5, 1.1 * len(tasks) + 2), 3.3 + legend_height(names))
        for (run, several), look in zip(losses.items(), line_styles(families or names), strict=True):
            for start, task in zip(starts, tasks, strict=False):
                shifted = [[(start + step, loss) for step, loss in log.get(task, ())] for log in several]
                _curve(axes, shifted, look, label=run if task == tasks[0] else None)
                points = [(start + step, loss) for step, loss in (held_out or {}).get(run, {}).get(task, ())]
                star = (kept or {}).get(run, {}).get(task)
                axes.plot(*_columns(points), color=look.color, linestyle="--", linewidth=1.0, marker=".", markersize=3)
                if star is not None:
                    axes.plot(start + star[0], star[1], marker="*", markersize=9, color=look.color, zorder=4)

        # Separate and name the tasks.
        for start in starts[:-1]:
            axes.axvline(start, color=GREY, linewidth=0.6, linestyle=":")
        _name_tasks(axes, tasks, starts, lengths)
        axes.set(xlabel="optimizer step of the stream", ylabel="training loss (nats per token)")
        axes.set_xlim(0, 1.02 * max(starts[-1], 1))  # room for a point at the last step
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(axis="x", visible=False)
        legend_below(figure, axes, names)
        return png(figure)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the mean over a window centred on each point.

    The window narrows at both ends, so that a trend is not shown late.
    """
    reach = max(1, len(values) // SMOOTHING_PARTS)
    averages = []
    for index in range(len(values)):
        # The window stays centred, so it shrinks towards both ends.
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        averages.append(sum(window) / len(window))
    return averages


Band = list[tuple[int, float, float]]  # place, lowest, highest


def _mean_and_band(several: Sequence[Sequence[tuple[int, float | None]]]) -> tuple[list[tuple[int, float]], Band]:
    """Return the mean of repeated curves at each place with a finite value. Without repetitions the band is empty."""
    at: dict[int, list[float]] = {}
    for curve in several:
        for place, value in curve:
            # A diverged value would stretch the axis until nothing else can be read.
            if value is not None and isfinite(value):
                at.setdefault(place, []).append(value)
    places = sorted(at)
    band = [(place, min(at[place]), max(at[place])) for place in places] if len(several) > 1 else []
    return [(place, fmean(at[place])) for place in places], band


def _curve(axes: Axes, several: Sequence[Points], look: LineStyle, label: str | None) -> None:
    """Draw one task's curve of one run."""
    points, band = _mean_and_band(several)
    steps, values = _columns(points)
    if len(points) > MAX_PLAIN_POINTS:
        if not band:
            axes.plot(steps, values, color=look.color, alpha=0.2, linewidth=0.7)
        values = smoothed(values)
        lows, highs = smoothed([low for _, low, _ in band]), smoothed([high for _, _, high in band])
        band = [(step, low, high) for (step, *_), low, high in zip(band, lows, highs, strict=True)]
    # A single point is a whole marker that no axis clips: a line through it would say more than is known.
    alone: dict[str, Any] = (
        {"marker": look.marker, "markersize": 6.5, "clip_on": False, "zorder": 3} if len(points) == 1 else {}
    )
    axes.plot(steps, values, label=label, **alone, **look.line)
    _fill(axes, band, look)


def _fill(axes: Axes, band: Band, look: LineStyle) -> None:
    if band:
        places, lows, highs = zip(*band, strict=True)
        axes.fill_between(places, lows, highs, color=look.color, alpha=0.15, linewidth=0)


def _name_tasks(axes: Axes, tasks: Sequence[str], starts: Sequence[int], lengths: Sequence[int]) -> None:
    """Write each task's name above its part of the curve. If there are very many, only those with room are named."""
    figure = axes.get_figure(root=True)
    # Names go from left to right; one that would touch its neighbour is left out.
    room, taken = 0.8 * (figure.get_figwidth() if figure else 0.0) / max(starts[-1], 1), 0.0
    for start, length, task in zip(starts, lengths, tasks, strict=False):
        middle, width = start + length / 2, max(room * length, MIN_NAME_INCHES)
        if length and middle * room - width / 2 >= taken - 0.01:
            taken = middle * room + width / 2
            name, at = shortened(task, max(6, int(12 * width))), (middle, 1.01)
            coordinates = ("data", "axes fraction")
            axes.annotate(name, at, xycoords=coordinates, ha="center", va="bottom", color=GREY, fontsize=7.5)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
