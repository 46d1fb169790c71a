"""How every figure looks, and how it becomes PNG bytes: without a display, and without touching matplotlib's state."""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from rich.cells import cell_len

DPI = 160
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
CHARACTER_INCHES = 0.085  # of a tick label, on average
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


def new_axes(width: float, height: float, num_panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of width x height inches with panels side by side; draw inside `with figure_style():`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


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
    figure = axes.get_figure(root=True)
    width = figure.get_figwidth() / len(figure.get_axes()) if figure else 0.0
    column_inches = 0.85 * width / max(len(columns), 1)
    names = [shortened(name) for name in columns]
    slanted = max(map(cell_len, names), default=0) * CHARACTER_INCHES > column_inches
    angle: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(len(columns)), names, **angle)
    if rows is not None:
        axes.set_yticks(range(len(rows)), [shortened(name, 28) for name in rows])


def shortened(name: str, length: int = 26) -> str:
    """name, or its start with an ellipsis."""
    return name if len(name) <= length else name[: length - 1] + "…"
