"""Hold out rows of a training file. A seed draws them: the same ones on every rank and in every run."""

import numpy as np
import numpy.typing as npt

from piece_ds.runtime.errors import UserError

Indices = npt.NDArray[np.int64]


def hold_out(num_rows: int, share: float, seed: int, source: str) -> tuple[Indices, Indices]:
    """Split the rows of a file into training rows and held-out rows. Both keep the file's order.

    Args:
        num_rows: of the file, before they become tokens, so that pieces of one text stay together.
        share: of the rows to hold out, in (0, 1). At least one row is held out and at least one stays.
        seed: of the draw, which depends only on it and on the number of rows.
        source: file, for the message.
    Returns:
        Numbers of training rows and of held-out rows, from 0, ascending.
    Raises:
        UserError: fewer than two rows.
    """
    if num_rows < 2:
        raise UserError(f"{source} has {num_rows} row: --validation_share needs at least 2")
    num_held_out = min(max(1, round(share * num_rows)), num_rows - 1)
    # numpy's generator gives the same numbers on every platform.
    order = np.random.default_rng(abs(seed)).permutation(num_rows)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
