"""`piece_ds masks`: where masks lie, by layer and kind of module, and how much they overlap."""

from argparse import Namespace
from collections.abc import Sequence

from piece_ds.checkpoint.mask_statistics import mask_statistics, overlap, read_index
from piece_ds.report.grids import Grid, kinds_grid, share
from piece_ds.report.table import print_grids


def masks(arguments: Namespace) -> None:
    """Print the tables of the mask files on the command line."""
    print_masks(arguments.masks)


def print_masks(paths: Sequence[str]) -> None:
    """Print tables of mask files: each by kind and by layer, and their overlap if there are several."""
    masks = [read_index(path) for path in paths]
    grids = []
    for path, (index, numel, metadata) in zip(paths, masks, strict=True):
        counts = mask_statistics(index, numel)
        heading = f"{path}: {metadata.get('selected')} of {metadata.get('total')} ({metadata.get('method')})"
        grids += [kinds_grid(heading, {"selected": counts}), layers_grid(f"{path}, by layer", counts)]
    if len(paths) > 1:
        rows = [
            (path, *(f"{overlap(a, b):.4f}" for b, *_ in masks)) for path, (a, *_) in zip(paths, masks, strict=True)
        ]
        grids.append(Grid("overlap (Jaccard)", ("", *paths), tuple(rows)))
    print_grids(grids)


def layers_grid(heading: str, counts: dict[str, dict[str, dict[str, int]]]) -> Grid:
    """Return the counts of mask_statistics() as a table of layers and kinds of module."""
    kinds = sorted({kind for row in counts.values() for kind in row})
    layers = sorted(counts, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0))
    rows = []
    for layer in layers:
        cells = [counts[layer].get(kind) for kind in kinds]
        rows.append((layer, *(f"{c['selected']} ({share(c['selected'] / c['total'])})" if c else "" for c in cells)))
    return Grid(heading, ("layer", *kinds), tuple(rows))
