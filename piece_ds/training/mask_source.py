"""The mask of a task as the settings ask for it, with what a stream knows besides the task's own data."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from piece_ds.checkpoint.mask_statistics import read_index
from piece_ds.checkpoint.statistics_file import has_statistics, load_statistics, save_statistics
from piece_ds.config.method_arguments import MethodArguments
from piece_ds.config.piece import PieceConfig
from piece_ds.data.collate import MicroBatches
from piece_ds.methods.estimate import count_selected, estimate_mask
from piece_ds.methods.registry import find_method
from piece_ds.methods.request import SelectionOptions
from piece_ds.runtime.errors import UserError
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
        config: the method's settings.
        files: the flags, for the files that they name.
        task: the task's name.
        earlier: mask files of the tasks before.
        general: rows that stand for general ability, or None.
        general_folder: where their statistics on the base model are, or will be after the first task's selection.
        is_base: whether the model is still the base model: no task has been trained.
        limit_forgetting: called with engine and TaskMask after training; scales the task's changes, says what it found.
    """

    config: PieceConfig
    files: MethodArguments
    task: str
    earlier: Sequence[Path] = ()
    general: Sequence[Any] | None = None
    general_folder: Path | None = None
    is_base: bool = True
    limit_forgetting: Callable[[Any, Any], dict[str, Any]] | None = None

    def count(self, model: nn.Module) -> int:
        """Return how many weights will be selected."""
        return count_selected(self.config, model, self.task)

    def batches(self, rows: Any, collate: Any) -> MicroBatches:
        """Return the micro-batches of the statistics pass."""
        batches = MicroBatches(rows, collate, self.config.importance_batch_size)
        return batches.first(self.config.importance_rows) if self.config.importance_rows else batches

    def estimate(
        self, engine: Any, batches: MicroBatches, layout: Layout, keeper: StatisticsCheckpoint | None = None
    ) -> Mask:
        """Take the statistics, or read them from --statistics_file, and select. A collective.

        Args:
            batches: from batches().
            engine, layout, keeper: as in estimate_mask().
        """
        return estimate_mask(
            engine,
            batches,
            self.config,
            layout=layout,
            stats=self._kept_statistics(engine, batches, layout, keeper),
            options=self._options(engine, batches, layout),
            keeper=keeper,
        )

    @property
    def _device(self) -> str | None:
        return "cpu" if self.config.statistics_device == "cpu" else None

    def _options(self, engine: Any, batches: MicroBatches, layout: Layout) -> SelectionOptions:
        general = None
        if self.general is not None:
            rows = MicroBatches(self.general, batches.collate, batches.batch_size)
            general = partial(self._general, engine, rows, layout)
        return SelectionOptions(self.task, general, [read_index(path)[0] for path in self.earlier])

    def _kept_statistics(
        self, engine: Any, batches: MicroBatches, layout: Layout, keeper: StatisticsCheckpoint | None
    ) -> GradientStats | None:
        """Return the statistics in --statistics_file, taken now if they are not there; None without it. A collective.

        Raises:
            UserError: the saved ones are of another model, other data or another batch size.
        """
        scorer = find_method(self.config.method).estimator
        if self.files.statistics_file is None or scorer is None or not scorer.needs_statistics:
            return None
        folder = Path(self.files.statistics_file) / self.task
        source = {"task": self.task, "rows": len(batches.rows), "batch_size": batches.batch_size}
        if has_statistics(folder):
            return load_statistics(folder, layout, scorer.needs_sum, self._device or engine.device, source)
        # With the sum: any method can use them.
        stats = collect_statistics(engine, batches, True, self._device, layout, keeper=keeper)
        save_statistics(folder, stats, source)
        return stats

    def _general(self, engine: Any, rows: MicroBatches, layout: Layout) -> GradientStats:
        """Return statistics of general text on the base model: taken once, then read. A collective.

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
            stats = collect_statistics(
                engine, rows, needs_sum=False, device=self._device, layout=layout, description="general statistics"
            )
            save_statistics(self.general_folder, stats, source)
        known = source if self.is_base else None  # later, the weights that it was taken of are not at hand
        return load_statistics(self.general_folder, layout, False, self._device or engine.device, known)


def _digest(rows: MicroBatches) -> str:
    """Return a digest of the tokens, in order."""
    digest = hashlib.sha256()
    for batch in rows:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()[:16]


def _fingerprint(model: nn.Module, layout: Layout) -> str:
    return hexadecimal(int(weights_fingerprint(model, Mask(layout, {}, 0))))
