"""`piece_ds masks`: where masks lie, by layer and kind of module, and how much they overlap."""

from argparse import Namespace

from rich.console import Console
from rich.table import Table

from piece_ds.checkpoint.mask_statistics import mask_statistics, overlap, read_index


def masks(arguments: Namespace) -> None:
    """Print the tables of the mask files that were named."""
    print_masks(arguments.masks)


def print_masks(paths: list[str]) -> None:
    """Tables for mask files: one per file, and their overlap where there are several."""
    console = Console()
    masks = [read_index(path) for path in paths]
    for path, (index, numel, metadata) in zip(paths, masks, strict=True):
        heading = f"{path}: {metadata.get('selected')} of {metadata.get('total')} ({metadata.get('method')})"
        console.print(statistics_table(heading, mask_statistics(index, numel)))
    if len(paths) > 1:
        table = Table(title="overlap (Jaccard)")
        for column in ("", *paths):
            table.add_column(column)
        for path, (first, _, _) in zip(paths, masks, strict=True):
            table.add_row(path, *(f"{overlap(first, second):.4f}" for second, _, _ in masks))
        console.print(table)


def statistics_table(heading: str, counts: dict[str, dict[str, dict[str, int]]]) -> Table:
    """What mask_statistics() returns as a table of layers and module types."""
    modules = sorted({module for row in counts.values() for module in row})
    table = Table(title=heading)
    table.add_column("layer")
    for module in modules:
        table.add_column(module, justify="right")
    for layer in sorted(counts, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0)):
        cells = [counts[layer].get(module) for module in modules]
        table.add_row(layer, *(f"{c['selected']} ({c['selected'] / c['total']:.2%})" if c else "" for c in cells))
    return table
