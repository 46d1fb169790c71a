"""Figures of matrices: results, places of selected weights, overlap of masks. Each takes plain values, gives a PNG."""

from collections.abc import Callable, Mapping, Sequence
from math import nan

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from piece_ds.report.canvas import figure_style, label_ticks, new_axes, png

# cividis is made to look the same with and without colour blindness, and its lightness grows evenly.
COLORS = "cividis"
ABSENT_COLOR = "#EFEFEF"
MAX_CELLS_WITH_TEXT = 14  # columns; more and the numbers touch


def result_heat_map(
    rows: Sequence[Sequence[float | None]],
    row_names: Sequence[str],
    tasks: Sequence[str],
    title: str,
    color_range: tuple[float | None, float | None] = (None, None),
    form: Callable[[float], str] = "{:.2f}".format,
) -> bytes:
    """Results on every task (columns) at every moment of the stream (rows); what was not evaluated stays grey.

    Args:
        rows: one measure; None where not evaluated.
        row_names: "before", "after X".
        tasks: names of the columns.
        title: what is measured, of which run.
        color_range: values at the ends of the colour scale; None takes them from the data.
        form: a value's text in its cell.
    Returns:
        PNG bytes.
    """
    values = _array(rows, len(tasks))
    with figure_style():
        figure, (axes,) = new_axes(1.8 + 0.75 * max(len(tasks), 4), 1.3 + 0.4 * max(len(row_names), 2))
        image = _image(axes, values, *color_range)
        label_ticks(axes, tasks, row_names)
        axes.set_title(title)
        if len(tasks) <= MAX_CELLS_WITH_TEXT:
            _write_cells(axes, image, values, form)
        else:
            figure.colorbar(image, ax=axes, shrink=0.8)
        return png(figure)


def mask_heat_map(counts: Mapping[str, Mapping[str, Mapping[str, int]]], title: str) -> bytes:
    """Where a mask's weights lie: for each layer and module type its share of all selected weights.

    Args:
        counts: layer -> module type -> {"selected", "total"}; layers that are numbers come first, in their order.
        title: which mask.
    Returns:
        PNG bytes; a cell is grey where the layer has no such module.
    """
    layers = sorted(counts, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
    modules = list(dict.fromkeys(module for layer in layers for module in counts[layer]))
    selected = _array([[counts[layer].get(m, {}).get("selected") for m in modules] for layer in layers], len(modules))
    shares = 100 * selected / max(np.nansum(selected), 1)
    with figure_style():
        height = 1.6 + min(0.3 * max(len(layers), 2), 8.0)
        figure, (axes,) = new_axes(2.2 + 0.62 * max(len(modules), 4), height)
        image = _image(axes, shares, 0.0, None)
        label_ticks(axes, modules, layers)
        every = -(-len(layers) // 26)  # a tick for every layer as long as they do not touch
        axes.set_yticks(range(0, len(layers), every), layers[::every])
        axes.set(xlabel="module type", ylabel="layer")
        axes.set_title(title)
        figure.colorbar(image, ax=axes, label="% of the selected weights", pad=0.02)
        return png(figure)


def overlap_heat_map(overlaps: Sequence[Sequence[float]], tasks: Sequence[str], title: str) -> bytes:
    """How much two tasks' masks share: the Jaccard index, shared / united selected weights.

    Args:
        overlaps: symmetric, in [0, 1].
        tasks: names of its rows and columns.
        title: of which run.
    Returns:
        PNG bytes. The diagonal, 1 by definition, is left grey so that it does not stretch the scale.
    """
    values = _array(overlaps, len(tasks))
    np.fill_diagonal(values, nan)
    highest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    with figure_style():
        side = 0.62 * max(len(tasks), 3)
        figure, (axes,) = new_axes(2.0 + side, 1.5 + side)
        image = _image(axes, values, 0.0, max(highest, 1e-6))
        axes.set_aspect("equal")
        label_ticks(axes, tasks, tasks)
        axes.set_title(title)
        if len(tasks) <= MAX_CELLS_WITH_TEXT:
            _write_cells(axes, image, values, "{:.2f}".format)
        else:
            figure.colorbar(image, ax=axes, shrink=0.8, label="Jaccard index")
        return png(figure)


def _array(rows: Sequence[Sequence[float | None]], num_columns: int) -> np.ndarray:
    """rows as fp64 with nan for None."""
    values = [[nan if value is None else float(value) for value in row] for row in rows]
    return np.array(values, dtype=np.float64).reshape(len(values), num_columns)


def _image(axes: Axes, values: np.ndarray, low: float | None, high: float | None) -> AxesImage:
    """values as coloured cells with thin white lines between them."""
    finite = values[np.isfinite(values)]
    low = low if low is not None else float(finite.min(initial=0.0) if finite.size == 0 else finite.min())
    high = high if high is not None else float(finite.max()) if finite.size else 1.0
    axes.set_facecolor(ABSENT_COLOR)
    shown = np.ma.masked_invalid(values)
    image = axes.imshow(
        shown, cmap=COLORS, vmin=low, vmax=max(high, low + 1e-9), aspect="auto", interpolation="nearest"
    )
    axes.grid(False)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image


def _write_cells(axes: Axes, image: AxesImage, values: np.ndarray, form: Callable[[float], str]) -> None:
    """Each known value in its cell, light on dark and dark on light."""
    tones = np.asarray(image.norm(values))
    for row, column in np.argwhere(np.isfinite(values)):
        color = "white" if tones[row, column] < 0.55 else "black"
        text = form(float(values[row, column]))
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
