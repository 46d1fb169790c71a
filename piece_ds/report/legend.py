"""The legend of a figure. It stands below the panels, where it hides no line, whatever the number of runs."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from piece_ds.report.style import shortened

MAX_NAME = 90  # characters
ROW_INCHES = 0.19


def legend_height(names: Sequence[str]) -> float:
    """Return the height that the legend takes below the panels, in inches."""
    return ROW_INCHES * (1 + -(-len(names) // _num_columns(names))) if len(names) > 1 else 0.0


def _num_columns(names: Sequence[str]) -> int:
    return max(1, min(4, 110 // (min(max(map(len, names)), MAX_NAME) + 8)))


def legend_below(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """Write the names of the runs below the panels. A single run needs no legend."""
    if len(names) > 1:
        handles, labels = axes.get_legend_handles_labels()
        labels = [shortened(label, MAX_NAME) for label in labels]
        figure.legend(handles, labels, loc="outside lower left", fontsize=8, ncols=_num_columns(names))
