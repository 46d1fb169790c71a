"""Rows dealt over ranks so that every rank makes the same number of forward passes.

Under ZeRO-3 each forward gathers parameters from all ranks, so a rank that stopped early would leave the others
waiting. A rank with nothing left repeats a row whose result is thrown away.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from piece_ds.distributed import rank, world_size


@dataclass(frozen=True)
class Share:
    """One rank's rows of one step.

    Attributes:
        indices: rows of the data set, at least one.
        counted: False for a filler, whose result must not enter anything.
    """

    indices: list[int]
    counted: bool


def deal_batches(lengths: Sequence[int], batch_size: int) -> list[Share]:
    """This rank's batches, in step order; every rank gets a list of the same length.

    Batches hold neighbours in length, the longest first, so that little is padded and a batch too large for the
    memory fails at once. Which rows share a batch does not depend on the number of ranks; batch b goes to rank b mod
    world size.

    Args:
        lengths: tokens of each row, equal on every rank.
        batch_size: rows in a batch, >= 1.
    Returns:
        ceil(ceil(rows / batch_size) / world size) shares; none when there are no rows.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shares = [Share(batch, counted=True) for batch in batches[rank() :: world_size()]]
    num_steps = -(-len(batches) // world_size())
    return shares + [Share(order[-1:], counted=False)] * (num_steps - len(shares))
