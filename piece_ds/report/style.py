"""The look of every figure, and how it becomes PNG bytes: without a display or any change of matplotlib's state."""

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, isfinite
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.cells import cell_len

from piece_ds.report.html import DPI
from piece_ds.runtime.text import printable

# Okabe and Ito 2008: these differ for every common form of colour blindness. Black is reserved for text.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINE_STYLES = ("-", "--", "-.", ":")  # a second cue besides the colour, and for more runs than colours
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
WIDE_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "SimHei",
)
WIDE = 2.0  # times the lowest value
CHARACTER_INCHES = 0.085  # of a tick label, on average
LINE_INCHES = 0.17  # of a tick label, with some air
TITLE_CHARACTER_INCHES = 0.1
MAX_WIDTH = 10.0  # inches of a figure, so that its text can be read on a page
MAX_HEIGHT = 40.0
MIN_SPAN = (
    0.2  # nats that an axis of losses shows at least: less is noise from the choice of text, and should look small
)
STYLE = {
    "text.parse_math": False,  # a name with two dollar signs is a name
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class LineStyle:
    """How one run is drawn in every figure."""

    color: str
    style: str
    marker: str

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.color, "linestyle": self.style}


def line_styles(families: Sequence[str]) -> list[LineStyle]:
    """Return a line style for each run: one colour per family, another style and marker for each of its members.

    If every run is its own family, or all are of one, style and marker change with the colour.
    """
    if len(set(families)) == 1:
        families = list(map(str, range(len(families))))
    order = list(dict.fromkeys(families))
    found = []
    for place, family in enumerate(families):
        color = order.index(family)
        member = families[:place].count(family) if len(order) < len(families) else color
        found.append(LineStyle(_nth(LINE_COLORS, color), _nth(LINE_STYLES, member), _nth(MARKERS, member)))
    return found


def _nth(choices: Sequence[str], index: int) -> str:
    return choices[index % len(choices)]


class _Renderer(RendererAgg):
    """Renderer that escapes unprintable characters in every text: fonts have no lone surrogates."""

    def draw_text(self, gc: Any, x: float, y: float, s: str, *args: Any, **kwargs: Any) -> None:
        super().draw_text(gc, x, y, printable(s), *args, **kwargs)

    def get_text_width_height_descent(self, s: str, *args: Any, **kwargs: Any) -> tuple[float, float, float]:
        return super().get_text_width_height_descent(printable(s), *args, **kwargs)


class _Canvas(FigureCanvasAgg):
    """Canvas that gives figures the renderer above."""

    def get_renderer(self) -> RendererAgg:
        width, height = self.get_width_height(physical=True)
        if getattr(self, "renderer", None) is None or (self.renderer.width, self.renderer.height) != (width, height):
            self.renderer = _Renderer(width, height, self.figure.dpi)
        return self.renderer


def not_less_than_noise(axes: Axes, values: Sequence[float]) -> None:
    """Show at least MIN_SPAN nats around the finite values, so that noise does not fill the panel."""
    known = [value for value in values if isfinite(value)]
    if known and max(known) - min(known) < MIN_SPAN:
        middle = (max(known) + min(known)) / 2
        axes.set_ylim(middle - 0.55 * MIN_SPAN, middle + 0.55 * MIN_SPAN)


def log_if_wide(axes: Axes, values: Sequence[float]) -> str:
    """Make the y axis logarithmic if one diverged run would flatten all others.

    Returns:
        A note for the title; empty if the axis stays linear.
    """
    known = [value for value in values if isfinite(value)]
    # A log axis has no zero, and without a wide spread it only confuses.
    if not known or min(known) <= 0 or max(known) < WIDE * min(known):
        return ""
    axes.set_yscale("log")
    # Labels of more than about a decade and a half would overlap.
    is_narrow = max(known) < 30 * min(known)
    subs = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0) if is_narrow else (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    return " (log scale)"


def new_axes(width: float, height: float, num_panels: int = 1, num_columns: int = 0) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, row by row. Draw inside `with figure_style():`.

    Args:
        width: of the figure, in inches, limited to MAX_WIDTH.
        height: in inches, limited to MAX_HEIGHT.
        num_panels: axes to make.
        num_columns: panels in a row; 0 means all of them. Places without a panel stay empty.
    """
    figure = Figure(figsize=(min(width, MAX_WIDTH), min(height, MAX_HEIGHT)), layout="constrained")
    _Canvas(figure)
    num_columns = num_columns or num_panels
    places = figure.subplots(-(-num_panels // num_columns), num_columns, squeeze=False).flatten()
    for place in places[num_panels:]:
        place.remove()
    return figure, list(places[:num_panels])


@contextmanager
def figure_style() -> Iterator[None]:
    """Set the style inside. A character that no installed font has becomes a box, without a warning."""
    installed = set(fontManager.get_font_names())
    # Task names may be Chinese: matplotlib's own font has no such characters.
    fonts = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]
    with matplotlib.rc_context({**STYLE, "font.family": fonts}), warnings.catch_warnings():  # type: ignore[dict-item]
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def png(figure: Figure) -> bytes:
    """Return figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def label_ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str] | None = None) -> None:
    """Name the x axis, slanted if the names would touch, and the y axis of a matrix.

    If even slanted names would touch, only every second, third, ... cell is named.
    """
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    grid = place.get_gridspec() if place else None
    width = figure.get_figwidth() / (grid.ncols if grid else 1) if figure else 0.0
    height = figure.get_figheight() / (grid.nrows if grid else 1) if figure else 0.0

    # Row names take their width from the columns.
    row_inches = CHARACTER_INCHES * max((cell_len(shortened(name, 28)) for name in rows or ()), default=0)
    column_inches = 0.9 * (width - row_inches - 0.3) / max(len(columns), 1)

    # Slant names that would touch; skip some if that is not enough.
    names = [shortened(name) for name in columns]
    slanted = max(map(cell_len, names), default=0) * CHARACTER_INCHES > column_inches
    angle: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    every = max(1, ceil(LINE_INCHES / max(column_inches, 1e-3))) if slanted else 1
    axes.set_xticks(range(0, len(columns), every), names[::every], **angle)
    if rows is not None:
        every = max(1, ceil(len(rows) * LINE_INCHES / max(height - 1.2, 0.5)))
        axes.set_yticks(range(0, len(rows), every), [shortened(name, 28) for name in rows[::every]])


def shortened(name: str, length: int = 26) -> str:
    """Return name on one line; if it is too long, its start with an ellipsis."""
    name = " ".join(name.split())
    return name if len(name) <= length else name[: length - 1] + "…"


def wrapped(title: str, width: float) -> str:
    """Return title in at most three lines that fit into width inches."""
    return "\n".join(textwrap.wrap(title, max(10, int(width / TITLE_CHARACTER_INCHES)), max_lines=3, placeholder="…"))
