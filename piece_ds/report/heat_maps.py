"""Figures of matrices: results, places of selected weights, overlap of masks.

Each takes plain values and gives a PNG.
"""

from collections.abc import Callable, Mapping, Sequence
from math import nan

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MultipleLocator

from piece_ds.report.style import MAX_WIDTH, MIN_SPAN, figure_style, label_ticks, new_axes, png, wrapped

# cividis looks the same with and without colour blindness, and its lightness grows evenly.
COLORS = "cividis"
ABSENT_COLOR, NONE_COLOR = "#E4E4E4", "#FFFFFF"
MAX_CELLS_WITH_TEXT = 14  # columns; with more, the numbers touch
MAX_PANELS = 12  # of one figure; if there are more, some are shown
FEWEST_DECADES = 2.0  # of a logarithmic colour scale
MAX_MODULES = 16  # module types side by side; with more, their names touch in half a page

Rows = Sequence[Sequence[float | None]]
Counts = Mapping[str, Mapping[str, Mapping[str, int]]]


def result_heat_map(
    rows: Rows,
    row_names: Sequence[str],
    tasks: Sequence[str],
    title: str,
    color_range: tuple[float | None, float | None] = (None, None),
    form: Callable[[float], str] = "{:.2f}".format,
) -> bytes:
    """Draw result_heat_maps() of one run. The title says what is measured, and of which run."""
    return result_heat_maps({title: rows}, row_names, tasks, color_range, form)


def result_heat_maps(
    panels: Mapping[str, Rows],
    row_names: Sequence[str],
    tasks: Sequence[str],
    color_range: tuple[float | None, float | None] = (None, None),
    form: Callable[[float], str] = "{:.2f}".format,
) -> bytes:
    """Draw results on every task (columns) at every moment of the stream (rows). What was not evaluated stays grey.

    Args:
        panels: title -> one measure; None if not evaluated. Panels stand side by side and share one colour scale. A
            panel of a run that has finished fewer tasks has fewer rows.
        row_names: "before", "after X"; those of the longest panel.
        tasks: names of the columns.
        color_range: values at the ends of the colour scale; None takes them from the data.
        form: formats a value for its cell.
    Returns:
        PNG bytes.
    """

    # One colour scale for all panels.
    values = {title: _array(rows, len(tasks), len(row_names)) for title, rows in panels.items()}
    low, high = _range(np.concatenate([part.flatten() for part in values.values()]), *color_range)
    if color_range == (None, None) and high - low < MIN_SPAN:  # colours would show noise
        low, high = (low + high - MIN_SPAN) / 2, (low + high + MIN_SPAN) / 2

    # As many panels in a row as the page has room for.
    width, height = 0.4 + 0.6 * max(len(tasks), 4), 0.6 + 0.34 * max(len(row_names), 2)
    num_columns = max(1, min(len(values), int((MAX_WIDTH - 1.8) // width)))
    num_rows = -(-len(values) // num_columns)
    with_text = len(tasks) <= MAX_CELLS_WITH_TEXT
    with figure_style():
        figure, all_axes = new_axes(width * num_columns + 1.8, height * num_rows + 0.9, len(values), num_columns)
        for place, (axes, (title, part)) in enumerate(zip(all_axes, values.items(), strict=True)):
            image = _image(axes, part, low, high)
            is_lowest, is_leftmost = place + num_columns >= len(values), place % num_columns == 0
            label_ticks(axes, tasks if is_lowest else [""] * len(tasks), row_names if is_leftmost else None)
            if not is_leftmost:
                axes.set_yticks([])
            axes.set_title(wrapped(title, width))
            if with_text:
                _write_cells(axes, image, part, form)
        if not with_text:
            figure.colorbar(image, ax=all_axes, shrink=0.8)
        return png(figure)


def mask_heat_maps(masks: Mapping[str, Counts]) -> bytes:
    """Draw how densely masks lie: for each layer and module type, the share of its own weights that the mask selects.

    The colour scale is logarithmic. So a norm with half of its weights selected and a matrix with a thousandth can both
    be read.

    Args:
        masks: panel title, such as a task -> layer -> module type -> {"selected", "total"}. Numbered layers come first,
            in their order. All masks are of one model: panels share layers, modules and colour scale.
    Returns:
        PNG bytes. A cell is grey if the layer has no such module, white if none of it is selected. With more than
        MAX_MODULES types, types of which no mask selects anything (all of a frozen vision tower) are left out, and
        panels are as wide as the page.
    """

    # Rows and columns that all panels share.
    layers = sorted({layer for counts in masks.values() for layer in counts}, key=_layer_order)
    modules = list(dict.fromkeys(m for layer in layers for counts in masks.values() for m in counts.get(layer, {})))
    if len(modules) > MAX_MODULES:
        modules = [module for module in modules if _any_selected(masks, module)] or modules[:1]

    # One colour scale for all panels.
    shares = {title: _shares(counts, layers, modules) for title, counts in masks.items()}
    low, high = _decades(np.concatenate([part.flatten() for part in shares.values()]))

    # Size the figure by what its cells need.
    num_columns = 1 if len(masks) == 1 or len(modules) > MAX_MODULES else 2
    num_rows = -(-len(masks) // num_columns)
    width = min(1.2 + 0.5 * max(len(modules), 5), MAX_WIDTH / num_columns if num_columns > 1 else MAX_WIDTH)
    height = 0.5 + min(0.26 * max(len(layers), 3), 5.0)
    with figure_style():
        figure, all_axes = new_axes(width * num_columns + 0.9, height * num_rows + 1.5, len(masks), num_columns)
        for place, (axes, (title, part)) in enumerate(zip(all_axes, shares.items(), strict=True)):
            # Below the scale's lower end, so that "none" gets its own colour and not that of a missing module.
            image = _image(axes, np.where(part == -np.inf, low - 1, part), low, high)
            is_lowest = place + num_columns >= len(masks)
            label_ticks(axes, modules if is_lowest else [""] * len(modules))
            every = -(-len(layers) // 20)  # a tick for every layer as long as they do not touch
            axes.set_yticks(range(0, len(layers), every), layers[::every])
            axes.set_title(wrapped(title, width))
            if place % num_columns == 0:
                axes.set_ylabel("layer")
        _add_scale_of_shares(figure, all_axes, image, aspect=14 * num_rows)
        return png(figure)


def _add_scale_of_shares(figure: Figure, all_axes: list[Axes], image: AxesImage, aspect: float) -> None:
    """Add the colour scale of shares, labelled in percent at every decade. Its lower end is "none"."""
    label = "% selected"  # short: a figure of few layers is low; the caption says the rest
    bar = figure.colorbar(image, ax=all_axes, label=label, pad=0.02, aspect=aspect, extend="min")
    bar.ax.yaxis.set_major_locator(MultipleLocator(1.0))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda power, _: f"{10**power:.3g}"))


def _decades(powers: np.ndarray) -> tuple[float, float]:
    """Return the ends of a logarithmic colour scale.

    They are the decades around the finite powers of ten, at least FEWEST_DECADES apart.
    """
    low, high = _range(powers, None, None)
    high = float(np.ceil(high))
    return min(float(np.floor(low)), high - FEWEST_DECADES), high


def _any_selected(masks: Mapping[str, Counts], module: str) -> bool:
    return any(of_layer.get(module, {}).get("selected") for counts in masks.values() for of_layer in counts.values())


def overlap_heat_map(overlaps: Sequence[Sequence[float]], tasks: Sequence[str], title: str) -> bytes:
    """Draw how much the masks of two tasks share: the Jaccard index, shared / united selected weights.

    Args:
        overlaps: symmetric, in [0, 1].
        tasks: names of rows and columns.
        title: of the figure.
    Returns:
        PNG bytes. The diagonal, 1 by definition, stays grey so that it does not stretch the scale.
    """
    values = _array(overlaps, len(tasks))
    np.fill_diagonal(values, nan)
    # All masks may be disjoint: then the scale needs some upper end.
    highest = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    with figure_style():
        side = 0.55 * max(len(tasks), 3)
        figure, (axes,) = new_axes(2.2 + side, 1.5 + side)
        image = _image(axes, values, 0.0, max(highest, 1e-6))
        axes.set_aspect("equal")
        label_ticks(axes, tasks, tasks)
        axes.set_title(title)
        if len(tasks) <= MAX_CELLS_WITH_TEXT:
            _write_cells(axes, image, values, "{:.2f}".format)
        else:
            figure.colorbar(image, ax=axes, shrink=0.8, label="Jaccard index")
        return png(figure)


def _layer_order(name: str) -> tuple[bool, int]:
    return not name.isdecimal(), int(name) if name.isdecimal() else 0


def _shares(counts: Counts, layers: Sequence[str], modules: Sequence[str]) -> np.ndarray:
    """Return log10 of the percentage of each cell's weights that are selected; -inf if none, nan if no such module."""
    cells = [[counts.get(layer, {}).get(module) for module in modules] for layer in layers]
    shares = [[100 * cell["selected"] / max(cell["total"], 1) if cell else None for cell in row] for row in cells]
    with np.errstate(divide="ignore"):
        return np.log10(_array(shares, len(modules)))


def _array(rows: Rows, num_columns: int, num_rows: int = 0) -> np.ndarray:
    """Return rows as fp64 with nan for None, padded with rows of nan up to num_rows."""
    values = [[nan if value is None else float(value) for value in row] for row in rows]
    values += [[nan] * num_columns] * (num_rows - len(values))
    return np.array(values, dtype=np.float64).reshape(len(values), num_columns)


def _range(values: np.ndarray, low: float | None, high: float | None) -> tuple[float, float]:
    """Return the ends of the colour scale: those given, else the extremes of the finite values."""
    finite = values[np.isfinite(values)]
    low = low if low is not None else float(finite.min()) if finite.size else 0.0
    high = high if high is not None else float(finite.max()) if finite.size else 1.0
    return low, max(high, low + 1e-9)


def _image(axes: Axes, values: np.ndarray, low: float, high: float) -> AxesImage:
    """Draw values as coloured cells with thin white lines between them."""
    axes.set_facecolor(ABSENT_COLOR)
    shown, colors = np.ma.masked_invalid(values), colormaps[COLORS].with_extremes(under=NONE_COLOR)
    line_width = 1.2 if max(values.shape) <= 2 * MAX_CELLS_WITH_TEXT else 0.0
    image = axes.imshow(shown, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axes.grid(False)
    axes.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=line_width)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    return image


def _write_cells(axes: Axes, image: AxesImage, values: np.ndarray, form: Callable[[float], str]) -> None:
    """Write each known value into its cell, light on dark or dark on light."""
    # Text colour follows the cell's lightness, which cividis raises evenly with the value.
    tones = np.asarray(image.norm(values))
    for row, column in np.argwhere(np.isfinite(values)):
        color = "white" if tones[row, column] < 0.55 else "black"
        text = form(float(values[row, column]))
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
