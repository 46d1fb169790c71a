"""Tables on the console."""

from collections.abc import Sequence
from dataclasses import replace

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from piece_ds.report.grids import Grid, run_grids, summary_grid
from piece_ds.report.results import RunResults
from piece_ds.runtime.text import printable

BORDER = 3  # columns of a terminal between two cells


def print_results(runs: Sequence[RunResults], console: Console | None = None) -> None:
    """Print the result matrix of each run, then the derived figures of all; call it on one rank.

    Args:
        runs: one or several.
        console: where to print; None means standard output.
    """
    print_grids([*(grid for run in runs for grid in run_grids(run)), summary_grid(runs)], console)


def print_grids(grids: Sequence[Grid], console: Console | None = None) -> None:
    """Print tables one after another, with every cell whole.

    A table that is wider than the terminal is printed in parts, each with the first column. If the output is no
    terminal, it is aligned plain text with long lines: wrapped rows would be unreadable in a log.
    """
    console = console or Console()
    for grid in map(_printable, grids):
        if console.is_terminal:
            for part in _parts(grid, console.width):
                console.print(_rich_table(part))
        else:
            console.print(Text(plain_text(grid)), soft_wrap=True)
        console.print()


def plain_text(grid: Grid) -> str:
    """Return grid as aligned text."""
    widths = _widths(grid)
    lines = []
    for row in (grid.header, *grid.rows):
        pads = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        cells = [
            cell + pad if column < grid.num_text_columns else pad + cell
            for column, (cell, pad) in enumerate(zip(row, pads, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([grid.title, lines[0], "-" * max(map(cell_len, lines)), *lines[1:]])


def _printable(grid: Grid) -> Grid:
    """Return grid with every unprintable character escaped."""
    rows = tuple(tuple(map(printable, row)) for row in grid.rows)
    return replace(grid, title=printable(grid.title), header=tuple(map(printable, grid.header)), rows=rows)


def _widths(grid: Grid) -> list[int]:
    table = (grid.header, *grid.rows)
    return [max(cell_len(row[column]) for row in table) for column in range(len(grid.header))]


def _parts(grid: Grid, width: int) -> list[Grid]:
    """Return grid split between columns into tables that fit into width, each with the columns that name the rows.

    A single column that does not fit beside them gets a table of its own, where its cells wrap.
    """
    widths, named = _widths(grid), grid.num_text_columns
    taken_by_names = sum(size + BORDER for size in widths[:named]) + 1

    # Fill one part after another.
    parts: list[list[int]] = []
    taken = width
    for column in range(named, len(grid.header)):
        # This column does not fit any more: start a new part.
        if taken + widths[column] + BORDER > width:
            parts.append([])
            taken = taken_by_names
        parts[-1].append(column)
        taken += widths[column] + BORDER
    if len(parts) < 2:
        return [grid]

    # Each part repeats the names of the rows.
    kept = [[*range(named), *columns] for columns in parts]
    return [
        replace(
            grid,
            title=f"{grid.title} ({place} of {len(kept)})",
            header=tuple(grid.header[column] for column in columns),
            rows=tuple(tuple(row[column] for column in columns) for row in grid.rows),
        )
        for place, columns in enumerate(kept, 1)
    ]


def _rich_table(grid: Grid) -> Table:
    table = Table(title=Text(grid.title), title_justify="left")
    for column, name in enumerate(grid.header):
        is_text = column < grid.num_text_columns
        table.add_column(Text(name), justify="left" if is_text else "right", overflow="fold")
    for row in grid.rows:
        table.add_row(*map(Text, row))
    return table
