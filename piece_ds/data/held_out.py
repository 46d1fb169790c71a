"""Rows of a training file that are held out: drawn by a seed, the same on every rank and in every run."""

import datasets
import numpy as np

from piece_ds.runtime.errors import UserError


def hold_out(rows: datasets.Dataset, share: float, seed: int, source: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows into those that are trained and those that are held out, both in the file's order.

    Args:
        rows: as read, before they become tokens: pieces of one text stay together.
        share: of the rows that is held out, in (0, 1); at least one row is, and at least one stays.
        seed: of the draw, which also depends on the number of rows and on nothing else.
        source: the file, for the message.
    Raises:
        UserError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"{source} has {len(rows)} row: --validation_share needs at least 2")
    num_held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
    order = np.random.default_rng(abs(seed)).permutation(len(rows))
    chosen, kept = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    return rows.select(kept), rows.select(chosen)
