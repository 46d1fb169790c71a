"""Draw the study: learned against lost, one panel a task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.continual.frontier import Point, useful_points
from bench.continual.real.grid import SWEEPS, Sweep
from bench.continual.real.runs import Record, curves_of, tasks_of

_PANELS_IN_A_ROW = 3
_LINEAR_BELOW = 0.05  # of the rise: near zero a logarithm would spread what is noise


@dataclass(frozen=True)
class Style:
    """How a sweep is drawn: its label, its colour, matplotlib's format of mark and line, and the width of the line."""

    label: str
    colour: object
    format: str
    width: float = 1.5


# Sweep -> what a user calls it: what people run today, and what this project advises.
RECIPES = {
    "full": Style("full fine-tuning", "tab:blue", "o--"),
    "LoRA": Style("LoRA", "tab:orange", "s--"),
    "PIECE-S 0.1 %": Style("--recipe paper: PIECE-S, 0.1 %", "tab:purple", "X:"),
    "ratio 1 %, scaled steps + KL": Style("--recipe mask", "tab:red", "D-", 2.2),
    "random 10 %, scaled steps + KL": Style("--recipe wide", "magenta", "*-", 2.2),
    "full, scaled steps + KL": Style("--recipe full", "tab:green", "^-", 2.2),
}


def recipes_figure(runs: list[Record]) -> Figure:
    """Return the picture of the recipes beside full fine-tuning, LoRA and the paper's setting.

    Every seed is a line, every rate a mark; rates above that at which a method learns most are not drawn.
    """
    figure = _panels(runs, list(RECIPES), RECIPES.__getitem__, columns=3)
    panel = figure.axes[0]
    panel.annotate(
        "better",
        xy=(0.03, 0.06),
        xytext=(0.2, 0.22),
        xycoords="axes fraction",
        arrowprops={"arrowstyle": "->", "color": "0.4"},
        color="0.4",
    )
    return figure


def frontier_figure(runs: list[Record]) -> Figure:
    """Return the picture of all methods.

    A method has one colour. Lines and marks tell whether it trains on general text: none, replay, or divergence. Sweeps
    that vary something else (text, rows, a budget) stay in the tables.
    """
    made = {run["name"] for run in runs}
    sweeps = [sweep for sweep in SWEEPS if sweep.name in made and not _varies_another_thing(sweep)]
    methods = list(dict.fromkeys(_method_of(sweep) for sweep in sweeps))
    colours = colormaps["tab10" if len(methods) <= 10 else "tab20"]

    def style_of(name: str) -> Style:
        sweep = next(sweep for sweep in sweeps if sweep.name == name)
        mark = "s--" if sweep.replay else "D-." if sweep.share else "^:" if sweep.divergence else "o-"
        return Style(name, colours(methods.index(_method_of(sweep))), mark)

    return _panels(runs, [sweep.name for sweep in sweeps], style_of, columns=4)


def _varies_another_thing(sweep: Sweep) -> bool:
    return bool(sweep.budget or sweep.importance_rows or sweep.spread or sweep.general_text == "real")


def _method_of(sweep: Sweep) -> str:
    return sweep.name.split(" + ")[0]


def _panels(runs: list[Record], names: Sequence[str], style_of: Callable[[str], Style], *, columns: int) -> Figure:
    """Return a figure of one panel a task: learned loss (better to the left) against the rise of general loss.

    Args:
        runs: one row a setting.
        names: of the sweeps that are drawn, in the order of the legend.
        style_of: a name -> how it is drawn.
        columns: of the legend.
    """
    tasks = tasks_of(runs)
    num_rows = -(-len(tasks) // _PANELS_IN_A_ROW)
    num_columns = -(-len(tasks) // num_rows)
    figure = Figure(figsize=(5.2 * num_columns, 4.2 * num_rows + 0.8), layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for panel in panels.flat[len(tasks) :]:
        panel.set_axis_off()
    for task, panel in zip(tasks, panels.flat, strict=False):
        _draw_task(panel, task, [run for run in runs if run["task"] == task], names, style_of)
    for row in panels:
        row[0].set_ylabel("rise of the loss on texts no method saw (better: low)")

    # A method may be missing in some panels.
    found = {}
    for panel in panels.flat:
        handles, labels = panel.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    shown = [label for label in (style_of(name).label for name in names) if label in found]
    figure.legend([found[label] for label in shown], shown, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def _draw_task(
    panel: Axes, task: str, runs: list[Record], names: Sequence[str], style_of: Callable[[str], Style]
) -> None:
    drawn: list[Point] = []
    for name in names:
        style = style_of(name)
        for curve in map(useful_points, curves_of(runs, name, "rise")):
            drawn += curve
            panel.plot(
                [point.learned for point in curve],
                [point.lost for point in curve],
                style.format,
                markersize=5,
                linewidth=style.width,
                color=style.colour,
                label=style.label,
            )
    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_title(task)
    panel.set_xlabel("loss on held-out answers after training (nats per token; better: left)")
    panel.set_yscale("symlog", linthresh=_LINEAR_BELOW)
    panel.set_yticks([0, 0.01, 0.05, 0.1, 0.5, 1], minor=False)
    panel.yaxis.set_major_formatter("{x:g}")
    if not drawn:
        return

    # Methods that learned much less than others leave the panel.
    learned = sorted(point.learned for point in drawn)
    widest = learned[int(0.9 * (len(learned) - 1))]
    margin = 0.05 * (widest - learned[0]) or 0.01
    panel.set_xlim(learned[0] - margin, widest + margin)
    panel.set_ylim(min(0.0, *(point.lost for point in drawn)) - 0.004, 1.5)
