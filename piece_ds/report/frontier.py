"""The frontier of learning against keeping: one point per setting, one line per method.

Along a line the learning rate or the ratio changes. A single point misleads: with a rate of zero, any method keeps
everything. What counts is how lines lie at equal learning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from piece_ds.report.legend import legend_below, legend_height
from piece_ds.report.style import LineStyle, figure_style, line_styles, log_if_wide, new_axes, not_less_than_noise, png

MAX_LABELS = 24  # more labels than this cover the points
# Points right, points up, alignment. Labels of neighbouring lines stand on different sides of their points.
LABEL_PLACES = ((6, 6, "left"), (6, -12, "left"), (-6, 6, "right"), (-6, -12, "right"))


@dataclass(frozen=True)
class FrontierPoint:
    """One setting: the mean over its seeds.

    Attributes:
        method: points of one method are joined by a line, in their order.
        label: what sets the point apart from others of its method, such as a learning rate.
        learned: mean result on each task right after it was trained.
        kept: value for each panel, such as the result on all tasks after the stream; None if not evaluated.
        repetitions: for each seed, (learned, values of the panels).
    """

    method: str
    label: str
    learned: float
    kept: tuple[float | None, ...]
    repetitions: Sequence[tuple[float, tuple[float | None, ...]]] = ()


def frontier_figure(
    points: Sequence[FrontierPoint],
    x_label: str,
    y_labels: Sequence[str],
    x_is_loss: bool = False,
    y_are_losses: Sequence[bool] = (),
) -> bytes:
    """Draw learned against kept, with one panel for each way of keeping. Up and to the right is better in all of them.

    Args:
        points: of every method, in the order of its line.
        x_label: of learned.
        y_labels: one for each entry of kept.
        x_is_loss: less is better, so the axis is inverted.
        y_are_losses: the same for each panel.
    Returns:
        PNG bytes. Small pale markers are single seeds.
    """
    methods = list(dict.fromkeys(point.method for point in points))

    # One panel for each way of keeping, one line for each method.
    with figure_style():
        figure, all_axes = new_axes(4.8 * len(y_labels), 4.2 + legend_height(methods), len(y_labels))
        for panel, axes in enumerate(all_axes):
            is_loss = panel < len(y_are_losses) and y_are_losses[panel]
            for index, (method, look) in enumerate(zip(methods, line_styles(methods), strict=True)):
                of_method = [point for point in points if point.method == method]
                _draw(axes, of_method, panel, look)
                if len(points) <= MAX_LABELS:
                    _label(axes, of_method, panel, look, LABEL_PLACES[index % len(LABEL_PLACES)])
            _name_axes(axes, x_label, y_labels[panel], x_is_loss, is_loss, [point.kept[panel] for point in points])
        legend_below(figure, all_axes[0], methods)
        return png(figure)


def _draw(axes: Axes, points: Sequence[FrontierPoint], panel: int, look: LineStyle) -> None:
    """Draw one method's line and the seeds around it."""
    known = [(point.learned, kept) for point in points if (kept := point.kept[panel]) is not None]
    seeds = [(x, y) for point in points for x, kept in point.repetitions if (y := kept[panel]) is not None]
    axes.plot(*_columns(known), marker=look.marker, label=points[0].method, markersize=6.5, **look.line)
    # With one seed each, the seeds are the points themselves.
    if len(seeds) > len(known):
        axes.scatter(*_columns(seeds), marker=look.marker, color=look.color, alpha=0.35, s=14)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label(
    axes: Axes, points: Sequence[FrontierPoint], panel: int, look: LineStyle, place: tuple[int, int, str]
) -> None:
    right, up, side = place
    for point in points:
        kept = point.kept[panel]
        if kept is not None and point.label:
            at = (point.learned, kept)
            axes.annotate(
                point.label, at, (right, up), textcoords="offset points", fontsize=7, ha=side, color=look.color
            )


def _name_axes(
    axes: Axes, x_label: str, title: str, x_is_loss: bool, is_loss: bool, values: Sequence[float | None]
) -> None:
    axes.margins(0.12)
    # Inverted, so that better is right for losses too.
    if x_is_loss:
        axes.invert_xaxis()
    else:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if is_loss:
        known = [value for value in values if value is not None]
        not_less_than_noise(axes, known)
        title += log_if_wide(axes, known)
        axes.invert_yaxis()
    else:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlabel=x_label, title=title)
