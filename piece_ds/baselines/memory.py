"""Rows of earlier tasks that a method keeps: a share of each, drawn once per task by the seed."""

import random

from piece_ds.baselines.baseline import Rows
from piece_ds.stream import Task


def num_kept(num_rows: int, ratio: float) -> int:
    """A share of the rows, rounded; at least one."""
    return max(1, round(ratio * num_rows))


def kept_rows(task: Task, ratio: float, seed: int) -> Rows:
    """num_kept() rows of a task's training rows, in their order; the same at every call."""
    count = num_kept(len(task.train), ratio)
    chosen = random.Random(f"{seed}/{task.name}").sample(range(len(task.train)), count)
    return task.train.select(sorted(chosen))
