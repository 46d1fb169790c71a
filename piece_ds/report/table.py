"""Tables on the console and in Markdown."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from piece_ds.report.grids import Grid, run_grids, summary_grid
from piece_ds.report.results import RunResults


def print_results(runs: Sequence[RunResults], console: Console | None = None) -> None:
    """Print the result matrix of each run, then the derived figures of all; call it on one rank.

    Args:
        runs: one or several.
        console: where to; None means standard output, as aligned plain text with long lines when
            that is no terminal: wrapped rows would be unreadable in a log.
    """
    print_grids([*(grid for run in runs for grid in run_grids(run)), summary_grid(runs)], console)


def print_grids(grids: Sequence[Grid], console: Console | None = None) -> None:
    """Print tables one after another, as print_results() does."""
    console = console or Console()
    for grid in grids:
        if console.is_terminal:
            console.print(_rich_table(grid))
        else:
            console.print(Text(plain_text(grid)), soft_wrap=True)
        console.print()


def markdown(grid: Grid) -> str:
    """grid as a Markdown table under a bold title, numbers on the right."""
    rule = ["---", *["---:"] * (len(grid.header) - 1)]
    lines = [f"| {' | '.join(map(_escape, row))} |" for row in (grid.header, *grid.rows)]
    return "\n".join([f"**{_escape(grid.title)}**", "", lines[0], f"| {' | '.join(rule)} |", *lines[1:]]) + "\n"


def markdown_results(runs: Sequence[RunResults]) -> str:
    """What print_results prints, as Markdown."""
    grids = [*(grid for run in runs for grid in run_grids(run)), summary_grid(runs)]
    return "\n".join(map(markdown, grids))


def plain_text(grid: Grid) -> str:
    """grid as aligned text."""
    table = (grid.header, *grid.rows)
    widths = [max(cell_len(row[column]) for row in table) for column in range(len(grid.header))]
    pads = [[" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)] for row in table]
    lines = [
        "  ".join([row[0] + pad[0], *map(str.__add__, pad[1:], row[1:])]).rstrip()
        for row, pad in zip(table, pads, strict=True)
    ]
    return "\n".join([grid.title, lines[0], "-" * max(map(cell_len, lines)), *lines[1:]])


def _rich_table(grid: Grid) -> Table:
    table = Table(title=Text(grid.title), title_justify="left")
    table.add_column(Text(grid.header[0]))
    for name in grid.header[1:]:
        table.add_column(Text(name), justify="right")
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table


def _escape(text: str) -> str:
    """text without what would end a Markdown cell."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
