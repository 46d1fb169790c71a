"""How every figure looks, and how it becomes PNG bytes: without a display, and without touching matplotlib's state."""

import io
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.cells import cell_len

from piece_ds.report.html import DPI

# Okabe and Ito 2008: told apart with every common form of colour blindness; black is left for text.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
LINE_STYLES = ("-", "--", "-.", ":")  # a second sign beside the colour, and for more runs than colours
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
TITLE_CHARACTER_INCHES = 0.1
STYLE = {
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


def looks(families: Sequence[str]) -> list[LineStyle]:
    """A look for each run, from what it belongs to: one colour a family, another style and marker for each member.

    Where every run is its own family, or all are of one, style and marker change with the colour.
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


def log_if_wide(axes: Axes, values: Sequence[float]) -> str:
    """Make the y axis logarithmic where one diverged run would flatten all others; what to say of it in the title."""
    known = [value for value in values if isfinite(value)]
    if not known or min(known) <= 0 or max(known) < WIDE * min(known):
        return ""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    return " (log scale)"


def new_axes(width: float, height: float, num_panels: int = 1, num_columns: int = 0) -> tuple[Figure, list[Axes]]:
    """A figure of width x height inches with panels row by row; draw inside `with figure_style():`.

    Args:
        num_columns: panels in a row; 0 means all of them. Places without a panel stay empty.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    num_columns = num_columns or num_panels
    places = figure.subplots(-(-num_panels // num_columns), num_columns, squeeze=False).flatten()
    for place in places[num_panels:]:
        place.remove()
    return figure, list(places[:num_panels])


@contextmanager
def figure_style() -> Iterator[None]:
    """Context in which figures are made; a character that no installed font has becomes a box, without a warning."""
    installed = set(fontManager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in WIDE_FONTS if name in installed)]
    with matplotlib.rc_context({**STYLE, "font.family": fonts}), warnings.catch_warnings():  # type: ignore[dict-item]
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def png(figure: Figure) -> bytes:
    """figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def label_ticks(axes: Axes, columns: Sequence[str], rows: Sequence[str] | None = None) -> None:
    """Names on the x axis, slanted when they would touch, and on the y axis of a matrix."""
    figure, place = axes.get_figure(root=True), axes.get_subplotspec()
    width = figure.get_figwidth() / (place.get_gridspec().ncols if place else 1) if figure else 0.0
    row_inches = CHARACTER_INCHES * max((cell_len(shortened(name, 28)) for name in rows or ()), default=0)
    column_inches = 0.9 * (width - row_inches - 0.3) / max(len(columns), 1)
    names = [shortened(name) for name in columns]
    slanted = max(map(cell_len, names), default=0) * CHARACTER_INCHES > column_inches
    angle: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(columns)), names, **angle)
    if rows is not None:
        axes.set_yticks(range(len(rows)), [shortened(name, 28) for name in rows])


def shortened(name: str, length: int = 26) -> str:
    """name, or its start with an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + "…"


def wrapped(title: str, width: float) -> str:
    """title in lines that fit into width inches; at most three."""
    return "\n".join(textwrap.wrap(title, max(10, int(width / TITLE_CHARACTER_INCHES)), max_lines=3, placeholder="…"))
