"""Make the mask of a task as the settings ask for it, with what a stream knows besides the task's own data."""

from collections.abc import Sequence
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
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.training.general_statistics import GeneralStatistics
from piece_ds.update.step_scale import StepScale, general_step_scale
from piece_ds.zero.statistics import StatisticsCheckpoint, collect_statistics


@dataclass(frozen=True)
class MaskSource:
    """Where the mask of one task comes from.

    Attributes:
        config: the method's settings.
        files: the flags, for the files that they name.
        task: the task's name.
        earlier: mask files of the earlier tasks.
        general: statistics of text that stands for general ability, or None.
    """

    config: PieceConfig
    files: MethodArguments
    task: str
    earlier: Sequence[Path] = ()
    general: GeneralStatistics | None = None

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

        Raises:
            UserError: the saved ones are of another model, other data or another batch size.
        """
        scorer = find_method(self.config.method).estimator
        if self.files.statistics_file is None or scorer is None or not scorer.needs_statistics:
            return None

        # Saved with their source, so that a run on other data refuses them.
        folder = Path(self.files.statistics_file) / self.task
        source = {"task": self.task, "rows": len(batches.rows), "batch_size": batches.batch_size}
        if has_statistics(folder):
            return load_statistics(folder, layout, scorer.needs_sum, self._device or engine.device, source)
        # With the sum: any method can use them.
        stats = collect_statistics(engine, batches, True, self._device, layout, keeper=keeper)
        save_statistics(folder, stats, source)
        return stats
