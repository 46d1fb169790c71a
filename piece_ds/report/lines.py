"""Figures of what changes along the stream: performance, general loss, training loss. Plain values in, PNG out."""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from piece_ds.report.canvas import (
    GREY,
    LINE_COLORS,
    LINE_STYLES,
    MARKERS,
    figure_style,
    label_ticks,
    new_axes,
    png,
    shortened,
)

Values = Sequence[float | None]
MAX_PLAIN_POINTS = 60  # more points than this are smoothed to show the trend, with the raw curve faint behind
SMOOTHING_PARTS = 30  # half a smoothing window is this part of a curve


def stream_figure(
    panels: Mapping[str, Mapping[str, Values]], moments: Sequence[str], shares: Collection[str] = ()
) -> bytes:
    """Measures along the stream, a panel each, with one line a run.

    Args:
        panels: y label, which is the panel's title -> run -> value at each moment; None where not evaluated.
        moments: names of the x axis, such as "before" and the tasks.
        shares: panels whose axis goes from 0 to 1, so that a small difference looks small.
    Returns:
        PNG bytes.
    """
    with figure_style():
        width = 1.6 + 0.55 * max(len(moments), 5)
        figure, all_axes = new_axes(max(width * len(panels), 5.5), 3.3, num_panels=max(len(panels), 1))
        for axes, (title, runs) in zip(all_axes, panels.items(), strict=False):
            for index, (run, values) in enumerate(runs.items()):
                known = [(x, y) for x, y in enumerate(values) if y is not None and isfinite(y)]
                axes.plot(*_columns(known), label=run, marker=MARKERS[index % len(MARKERS)], **_line(index))
            axes.set_xlim(-0.3, len(moments) - 0.7)
            if title in shares:
                axes.set_ylim(-0.02, 1.02)
            label_ticks(axes, moments)
            axes.set_title(title)
        _legend(all_axes[0], len(next(iter(panels.values()), {})))
        return png(figure)


def training_figure(losses: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], tasks: Sequence[str]) -> bytes:
    """Training loss over all steps of the stream, task after task, with one line a run.

    Args:
        losses: run -> task -> (step within the task, loss) in step order.
        tasks: in the order of training.
    Returns:
        PNG bytes; tasks are set apart by thin lines. Long curves are smoothed, the raw values faint behind.
    """
    lengths = [
        max((points[-1][0] for run in losses.values() if (points := run.get(task))), default=0) for task in tasks
    ]
    starts = [0, *accumulate(lengths)]
    with figure_style():
        figure, (axes,) = new_axes(max(6.5, 1.1 * len(tasks) + 2), 3.3)
        for index, (run, of_task) in enumerate(losses.items()):
            for start, task in zip(starts, tasks, strict=False):
                points = [(start + step, loss) for step, loss in of_task.get(task, ()) if isfinite(loss)]
                _curve(axes, points, index, label=run if task == tasks[0] else None)
        for start, length, task in zip(starts, lengths, tasks, strict=False):
            axes.axvline(start, color=GREY, linewidth=0.6, linestyle=":")
            axes.annotate(
                shortened(task, 14),
                (start + length / 2, 1.0),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                color=GREY,
                fontsize=7.5,
            )
        axes.set(xlabel="optimizer step of the stream", ylabel="training loss (nats per token)")
        axes.set_xlim(0, max(starts[-1], 1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.grid(axis="x", visible=False)
        _legend(axes, len(losses))
        return png(figure)


def _curve(axes: Axes, points: list[tuple[int, float]], index: int, label: str | None) -> None:
    """One task's curve of one run."""
    steps, values = _columns(points)
    if len(points) > MAX_PLAIN_POINTS:
        axes.plot(steps, values, color=LINE_COLORS[index % len(LINE_COLORS)], alpha=0.2, linewidth=0.7)
        values = smoothed(values)
    marker = "." if len(points) == 1 else None
    axes.plot(steps, values, label=label, marker=marker, **_line(index))


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window centred on each point, narrower at the ends, so that a trend is not shown late."""
    reach = max(1, len(values) // SMOOTHING_PARTS)
    averages = []
    for index in range(len(values)):
        near = min(reach, index, len(values) - 1 - index)
        window = values[index - near : index + near + 1]
        averages.append(sum(window) / len(window))
    return averages


def _line(index: int) -> dict[str, Any]:
    return {"color": LINE_COLORS[index % len(LINE_COLORS)], "linestyle": LINE_STYLES[index % len(LINE_STYLES)]}


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _legend(axes: Axes, num_runs: int) -> None:
    """Names of the runs; one run needs none."""
    if num_runs > 1:
        axes.legend(fontsize=8)
