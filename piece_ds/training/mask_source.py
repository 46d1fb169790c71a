"""Make the mask of a task as the settings ask for it, with what a stream knows besides the task's own data."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from piece_ds.checkpoint.mask_base import fingerprint_of
from piece_ds.checkpoint.mask_statistics import read_index
from piece_ds.checkpoint.statistics_file import (
    forget_statistics,
    has_statistics,
    load_statistics,
    save_statistics,
    source_of,
)
from piece_ds.config.method_arguments import MethodArguments
from piece_ds.config.piece import PieceConfig
from piece_ds.data.collate import MicroBatches
from piece_ds.data.rows_digest import digest_of_rows
from piece_ds.methods.estimate import count_selected, estimate_mask
from piece_ds.methods.registry import find_method
from piece_ds.methods.request import SelectionOptions
from piece_ds.runtime.distributed import is_main
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.training.general_statistics import GeneralStatistics
from piece_ds.update.step_scale import StepScale, general_step_scale
from piece_ds.zero.statistics import StatisticsCheckpoint, collect_statistics

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskSource:
    """Where the mask of one task comes from.

    Attributes:
        config: the method's settings.
        files: the flags, for the files that they name.
        task: the task's name.
        earlier: mask files of the earlier tasks.
        general: statistics of text that stands for general ability, or None.
        is_first: whether the model is the one that was given: no task has been trained.
    """

    config: PieceConfig
    files: MethodArguments
    task: str
    earlier: Sequence[Path] = ()
    general: GeneralStatistics | None = None
    is_first: bool = True

    def count(self, model: nn.Module) -> int:
        """Return how many weights will be selected."""
        return count_selected(self.config, model, self.task)

    def batches(self, rows: Any, collate: Any) -> MicroBatches:
        """Return the micro-batches of the statistics pass."""
        # --importance_rows: the first rows only.
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
            options=self._options(engine, layout),
            keeper=keeper,
        )

    @property
    def _device(self) -> str | None:
        return "cpu" if self.config.statistics_device == "cpu" else None

    def step_scale(self, engine: Any, layout: Layout, has_moved: bool) -> StepScale | None:
        """Return the factors of --step_scale general, or None without it. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine.
            layout: of its model.
            has_moved: as in GeneralStatistics.take().
        """
        if self.config.step_scale == "none":
            return None
        assert self.general is not None
        return general_step_scale(self.general.take(engine, layout, has_moved), self.config.damping_quantile)

    def _options(self, engine: Any, layout: Layout) -> SelectionOptions:
        earlier = [read_index(path)[0] for path in self.earlier]
        if self.general is None:
            return SelectionOptions(self.task, earlier=earlier)
        take = partial(self.general.take, engine, layout)
        return SelectionOptions(self.task, take, self.general.batches, earlier)

    def _kept_statistics(
        self, engine: Any, batches: MicroBatches, layout: Layout, keeper: StatisticsCheckpoint | None
    ) -> GradientStats | None:
        """Return the statistics in --statistics_file, taken now if they are not there; None without it. A collective.

        Saved ones that a later task finds are of the weights that another run had come to, unless that run was the
        same up to here: then they serve, else they are taken again.

        Raises:
            UserError: the saved ones are of other weights, other rows or another batch size.
        """
        scorer = find_method(self.config.method).estimator
        if self.files.statistics_file is None or scorer is None or not scorer.needs_statistics:
            return None

        # Saved with their source, so that a run on other data or weights refuses them.
        folder = Path(self.files.statistics_file) / self.task
        source = self.source_of(engine, batches, layout)
        if has_statistics(folder) and not self._is_outdated(folder, source):
            return load_statistics(folder, layout, scorer.needs_sum, self._device or engine.device, source)
        # With the sum: any method can use them.
        stats = collect_statistics(engine, batches, True, self._device, layout, keeper=keeper)
        forget_statistics(folder)
        save_statistics(folder, stats, source)
        return stats

    def source_of(self, engine: Any, batches: MicroBatches, layout: Layout) -> dict[str, object]:
        """Return what statistics taken now are of: rows, micro-batches and weights. A collective.

        Cost: reads the rows once, and this rank's part of the weights.
        """
        return {
            "task": self.task,
            "rows": len(batches.rows),
            "batch_size": batches.batch_size,
            "text": digest_of_rows(batches.rows),
            "weights": fingerprint_of(engine.module, layout),
        }

    def _is_outdated(self, folder: Path, source: dict[str, object]) -> bool:
        """Return whether saved statistics are to be taken again rather than refused, and say so."""
        found = source_of(folder).get("weights")
        if found is None:
            reason = "do not say of which weights they are"
        elif not self.is_first and found != source["weights"]:
            reason = f"are of weights {found}, not of {source['weights']}, which the tasks before have led to"
        else:
            return False
        if is_main():
            logger.warning("statistics in %s %s: they are taken again", folder, reason)
        return True
