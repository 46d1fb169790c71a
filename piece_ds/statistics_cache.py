"""Statistics from --statistics_file where they are saved already, else from a pass that saves them there."""

from pathlib import Path
from typing import Any

import torch

from piece_ds.checkpoint import load_statistics, save_statistics
from piece_ds.checkpoint.statistics_file import has_statistics
from piece_ds.config import MethodArguments
from piece_ds.importance import estimator
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.stream.micro_batches import MicroBatches
from piece_ds.zero import collect_statistics


def statistics_of(
    method: MethodArguments,
    task: str,
    engine: Any,
    batches: MicroBatches,
    layout: Layout,
    device: torch.device | str | None,
) -> GradientStats | None:
    """The statistics that method needs of task's data, or None where it needs none. A collective.

    Raises:
        UserError: the saved ones are of another model, other data or another batch size.
    """
    scorer = estimator(method.method)
    if not scorer.needs_squares:
        return None
    if method.statistics_file is None:
        return collect_statistics(engine, batches, scorer.needs_sum, device, layout)
    folder = Path(method.statistics_file) / task
    source = {"task": task, "rows": len(batches.rows), "batch_size": batches.batch_size}
    if has_statistics(folder):
        return load_statistics(folder, layout, scorer.needs_sum, device or engine.device, source)
    stats = collect_statistics(engine, batches, True, device, layout)  # with the sum: any method can use them
    save_statistics(folder, stats, source)
    return stats
