"""Hold out rows of a training file. A seed draws them: the same ones on every rank and in every run."""

import datasets
import numpy as np

from piece_ds.runtime.errors import UserError


def hold_out(rows: datasets.Dataset, share: float, seed: int, source: str) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split rows into training rows and held-out rows. Both keep the file's order.

    Args:
        rows: as read, before they become tokens, so that pieces of one text stay together.
        share: of the rows to hold out, in (0, 1). At least one row is held out and at least one stays.
        seed: of the draw, which depends only on it and on the number of rows.
        source: file, for the message.
    Returns:
        Training rows and held-out rows.
    Raises:
        UserError: fewer than two rows.
    """
    if len(rows) < 2:
        raise UserError(f"{source} has {len(rows)} row: --validation_share needs at least 2")
    num_held_out = min(max(1, round(share * len(rows))), len(rows) - 1)
    # numpy's generator gives the same numbers on every platform.
    order = np.random.default_rng(abs(seed)).permutation(len(rows))
    chosen, kept = np.sort(order[:num_held_out]), np.sort(order[num_held_out:])
    return rows.select(kept), rows.select(chosen)
