"""Replay: train rows of earlier tasks again, after each epoch of new rows or mixed with them."""

import random
from collections.abc import Callable, Sequence

import datasets
import torch

from piece_ds.data.tasks import Task
from piece_ds.methods.baseline import Baseline, Rows, TaskContext


def num_kept(num_rows: int, ratio: float) -> int:
    """Return a share of the rows, rounded; at least one."""
    return max(1, round(ratio * num_rows))


def kept_rows(task: Task, ratio: float, seed: int) -> Rows:
    """Return num_kept() rows of a task's training rows, in their order; the same at every call."""
    # Drawn from seed and task name only, so later tasks and resumed runs keep the same rows.
    count = num_kept(len(task.train), ratio)
    chosen = random.Random(f"{seed}/{task.name}").sample(range(len(task.train)), count)
    return task.train.select(sorted(chosen))


class ReplayOnline(Baseline):
    """New rows and --memory_ratio of every earlier task's, shuffled together.

    Source: TRACE (arXiv 2310.06762) and its authors' replay_online. Here the kept rows are drawn; there they are the
    first.
    """

    resumes_inside = False

    def num_rows(self, task: Task, earlier: Sequence[Task]) -> int:
        ratio = self.settings.memory_ratio
        return len(task.train) + sum(num_kept(len(other.train), ratio) for other in earlier)

    def rows(self, context: TaskContext) -> Rows:
        kept = [kept_rows(task, self.settings.memory_ratio, context.seed) for task in context.earlier]
        return datasets.concatenate_datasets([context.task.train, *kept])


class Replay(ReplayOnline):
    """An epoch is all new rows, shuffled, then all kept rows of earlier tasks, shuffled.

    If --max_steps is below an epoch of new rows, no kept row is ever reached: count in epochs.
    """

    def epoch(self, context: TaskContext) -> Callable[[torch.Generator], list[int]] | None:
        num_new, total = len(context.task.train), len(self.rows(context))

        def order(generator: torch.Generator) -> list[int]:
            new = torch.randperm(num_new, generator=generator)
            kept = torch.randperm(total - num_new, generator=generator) + num_new
            return torch.cat([new, kept]).tolist()

        return order if context.earlier else None
