"""The mask of a task as the settings ask for it, with statistics kept in --statistics_file where one is named."""

from pathlib import Path
from typing import Any

import torch

from piece_ds.checkpoint import load_statistics, save_statistics
from piece_ds.checkpoint.statistics_file import has_statistics
from piece_ds.config import MethodArguments
from piece_ds.estimate import estimate_mask
from piece_ds.importance import estimator
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.stream.micro_batches import MicroBatches
from piece_ds.zero import collect_statistics


def mask_of_task(
    method: MethodArguments, task: str, seed: int, engine: Any, batches: MicroBatches, layout: Layout
) -> Mask:
    """Statistics (taken, or read from --statistics_file) and selection. A collective.

    Args:
        task: the task's name; names its statistics under --statistics_file.
        seed: of `random`.
        engine, batches, layout: as in estimate_mask().
    """
    device = "cpu" if method.statistics_device == "cpu" else None
    return estimate_mask(
        engine,
        batches,
        method.method,
        method.mask_ratio,
        method.budget,
        method.importance_lambda,
        seed,
        device,
        layout,
        _statistics_of(method, task, engine, batches, layout, device),
    )


def _statistics_of(
    method: MethodArguments,
    task: str,
    engine: Any,
    batches: MicroBatches,
    layout: Layout,
    device: torch.device | str | None,
) -> GradientStats | None:
    """The statistics kept in --statistics_file, taken now where they are not there; None without it. A collective.

    Raises:
        UserError: the saved ones are of another model, other data or another batch size.
    """
    scorer = estimator(method.method)
    if not scorer.needs_squares or method.statistics_file is None:
        return None
    folder = Path(method.statistics_file) / task
    source = {"task": task, "rows": len(batches.rows), "batch_size": batches.batch_size}
    if has_statistics(folder):
        return load_statistics(folder, layout, scorer.needs_sum, device or engine.device, source)
    stats = collect_statistics(engine, batches, True, device, layout)  # with the sum: any method can use them
    save_statistics(folder, stats, source)
    return stats
