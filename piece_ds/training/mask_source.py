"""The mask of a task as the settings ask for it, with what a stream knows besides the task's own data."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from piece_ds.checkpoint.mask_statistics import read_index
from piece_ds.checkpoint.statistics_file import has_statistics, load_statistics, save_statistics
from piece_ds.config.arguments import MethodArguments
from piece_ds.data.collate import MicroBatches
from piece_ds.methods.estimate import count_selected, estimate_mask
from piece_ds.methods.registry import SELECTIONS
from piece_ds.methods.request import SelectionOptions
from piece_ds.runtime.errors import UserError
from piece_ds.selection.estimators import estimator
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.state.weights_hash import hexadecimal
from piece_ds.zero.statistics import StatisticsCheckpoint, collect_statistics
from piece_ds.zero.weights import weights_fingerprint


@dataclass(frozen=True)
class MaskSource:
    """Where the mask of one task comes from.

    Attributes:
        method: the settings.
        task: the task's name.
        seed: of what is drawn.
        earlier: mask files of the tasks before.
        general: rows that stand for general ability, or None.
        general_folder: where their statistics on the base model are, or will be after the first task's selection.
        is_base: whether the model is still the base model: no task has been trained.
    """

    method: MethodArguments
    task: str
    seed: int
    earlier: Sequence[Path] = ()
    general: Sequence[Any] | None = None
    general_folder: Path | None = None
    is_base: bool = True

    def count(self, model: nn.Module) -> int:
        """How many weights will be selected."""
        return count_selected(self.method.method, model, self.method.mask_ratio, self.seed, self.task)

    def estimate(
        self, engine: Any, batches: MicroBatches, layout: Layout, keeper: StatisticsCheckpoint | None = None
    ) -> Mask:
        """Statistics (taken, or read from --statistics_file) and selection. A collective.

        Args:
            engine, batches, layout, keeper: as in estimate_mask().
        """
        method = self.method
        device = "cpu" if method.statistics_device == "cpu" else None
        return estimate_mask(
            engine,
            batches,
            method.method,
            method.mask_ratio,
            method.budget,
            method.importance_lambda,
            self.seed,
            device,
            layout,
            _statistics_of(method, self.task, engine, batches, layout, device, keeper),
            self._options(engine, batches, layout, device),
            keeper,
        )

    def _options(self, engine: Any, batches: MicroBatches, layout: Layout, device: str | None) -> SelectionOptions:
        general = None
        if self.general is not None:
            rows = MicroBatches(self.general, batches.collate, batches.batch_size)
            general = partial(self._general, engine, rows, layout, device)
        return SelectionOptions(
            self.task, self.method.lift_rank, general, [read_index(path)[0] for path in self.earlier]
        )

    def _general(self, engine: Any, rows: MicroBatches, layout: Layout, device: str | None) -> GradientStats:
        """Statistics of general text on the base model: taken once, then read. A collective.

        Raises:
            UserError: those in the folder are of another model, other weights, other text or another batch size.
        """
        assert self.general_folder is not None
        if not self.is_base and not has_statistics(self.general_folder):
            raise UserError(
                f"no statistics of the base model in {self.general_folder}, and the model is no longer the "
                "base model: begin the stream again in another folder"
            )
        source: dict[str, object] = {"rows": len(rows.rows), "batch_size": rows.batch_size, "text": _digest(rows)}
        if self.is_base:
            source["weights"] = _fingerprint(engine.module, layout)
        if not has_statistics(self.general_folder):
            stats = collect_statistics(engine, rows, False, device, layout, "general statistics")
            save_statistics(self.general_folder, stats, source)
        known = source if self.is_base else None  # later, the weights that it was taken of are not at hand
        return load_statistics(self.general_folder, layout, False, device or engine.device, known)


def _digest(rows: MicroBatches) -> str:
    """Of the tokens, in order."""
    digest = hashlib.sha256()
    for batch in rows:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()[:16]


def _fingerprint(model: nn.Module, layout: Layout) -> str:
    return hexadecimal(int(weights_fingerprint(model, Mask(layout, {}, 0))))


def _statistics_of(
    method: MethodArguments,
    task: str,
    engine: Any,
    batches: MicroBatches,
    layout: Layout,
    device: torch.device | str | None,
    keeper: StatisticsCheckpoint | None,
) -> GradientStats | None:
    """The statistics kept in --statistics_file, taken now where they are not there; None without it. A collective.

    Raises:
        UserError: the saved ones are of another model, other data or another batch size.
    """
    if method.statistics_file is None or method.method in SELECTIONS or not estimator(method.method).needs_squares:
        return None
    folder = Path(method.statistics_file) / task
    source = {"task": task, "rows": len(batches.rows), "batch_size": batches.batch_size}
    if has_statistics(folder):
        return load_statistics(folder, layout, estimator(method.method).needs_sum, device or engine.device, source)
    # With the sum: any method can use them.
    stats = collect_statistics(engine, batches, True, device, layout, keeper=keeper)
    save_statistics(folder, stats, source)
    return stats
