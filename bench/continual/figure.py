"""The frontier figure: learning to the right, what was lost upwards, one curve a method over learning rates."""

from collections.abc import Sequence
from math import isfinite
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.continual.curves import LOST, Method, number, start_and_best
from bench.continual.grid import MAIN_RATIO
from piece_ds.report.style import LINE_COLORS, LINE_STYLES, MARKERS, figure_style, png

EQUAL_K = ("piece-s", "piece-f", "piece-ratio", "random", "magnitude")
OF_RATIO = ("piece-s", "piece-ratio", "random")
SELECTIONS = ("piece-s-disjoint", "lift", "shira", "migu", "hft", "layernorm")
PLAIN = ("seqft", "lora")
LEAST_SHARE = 0.4  # of the learning: what lies to the left of it did not learn the tasks
SHOWN = {"general_loss_change": (-0.02, 3.0), "loss_backward_transfer": (None, 3.0)}  # with the ends of the axis


def frontier_figure(methods: Sequence[Method]) -> bytes:
    """PNG with a row for each question: equal k, the ratio, other masks, other methods.

    Its columns are what happens to general text and to earlier tasks. Means over seeds at each rate, bars from the
    lowest to the highest seed. The upward axis is linear to 0.1 nats, and logarithmic beyond.
    """
    panels = {title: chosen for title, chosen in _panels(methods).items() if chosen}
    start, best = start_and_best(list(methods))
    with figure_style():
        figure = Figure(figsize=(11.5, 3.5 * len(panels)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(panels), len(SHOWN), squeeze=False)
        for row, (title, chosen) in zip(grid, panels.items(), strict=True):
            for axes, (column, ends) in zip(row, SHOWN.items(), strict=True):
                _draw(axes, chosen, column)
                axes.set_xlim(start - LEAST_SHARE * (start - best), best - 0.04 * (start - best))
                axes.set_yscale("symlog", linthresh=0.1)
                axes.set_ylim(*ends)
                axes.axhline(0, color="#999999", linewidth=0.8)
                axes.set_xlabel("task loss right after learning (to the right: more learned)")
                axes.set_ylabel(LOST[column])
                axes.set_title(title)
            row[-1].legend(fontsize=8.5, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        return png(figure)


def _panels(methods: Sequence[Method]) -> dict[str, list[Method]]:
    """Full fine-tuning and LoRA come first in all of them, so that they look alike."""
    plain = [method for name in PLAIN for method in methods if method.method == name]
    own = [method for method in methods if method.method == "piece-s" and method.ratio == MAIN_RATIO]

    def masks(names: Sequence[str]) -> list[Method]:
        largest_first = sorted(methods, key=lambda method: -method.ratio)
        return [method for name in names for method in largest_first if method.method == name]

    known = (*PLAIN, *EQUAL_K, *SELECTIONS)
    others = [method for method in methods if method.method not in known]
    return {
        f"equal k: {100 * MAIN_RATIO:g} % of the weights": plain + [m for m in masks(EQUAL_K) if m.ratio == MAIN_RATIO],
        "the ratio": masks(OF_RATIO),
        "other selections": plain + own + masks(SELECTIONS) if masks(SELECTIONS) else [],
        "other methods": plain + own + others if others else [],
    }


def _draw(axes: Axes, methods: Sequence[Method], column: str) -> None:
    names = list(dict.fromkeys(method.method for method in methods))
    ratios = sorted({method.ratio for method in methods if method.ratio < 1}, reverse=True)
    for method in methods:
        index = names.index(method.method)
        style = ratios.index(method.ratio) if len(ratios) > 1 and method.ratio < 1 else index // len(LINE_COLORS)
        points = [_point(rows, column) for rows in method.of_rate().values()]
        points = [point for point in points if all(map(isfinite, point))]
        if not points:
            continue
        x, y, low, high = zip(*points, strict=True)
        axes.errorbar(
            x,
            y,
            yerr=(low, high),
            label=method.name,
            color=LINE_COLORS[index % len(LINE_COLORS)],
            linestyle=LINE_STYLES[style % len(LINE_STYLES)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=2,
            elinewidth=0.8,
        )


def _point(rows: list[dict[str, str]], column: str) -> tuple[float, float, float, float]:
    """(learned, lost, and how far its lowest and highest seed are from that mean)."""
    lost = [number(run, column) for run in rows]
    mean = fmean(lost)
    return fmean(number(run, "loss_learned") for run in rows), mean, mean - min(lost), max(lost) - mean
