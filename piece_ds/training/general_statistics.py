"""Take the statistics of general text on the base model: once, kept in a folder, read by whatever needs them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from piece_ds.checkpoint.mask_base import fingerprint_of
from piece_ds.checkpoint.statistics_file import has_statistics, load_statistics, save_statistics
from piece_ds.config.method_arguments import MethodArguments
from piece_ds.data.collate import MicroBatches
from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.statistics import collect_statistics


@dataclass(frozen=True, kw_only=True)
class GeneralStatistics:
    """Where the statistics of general text are, or will be.

    Attributes:
        rows: text that stands for general ability.
        collate: rows -> batch.
        batch_size: rows of a micro-batch.
        folder: where they are kept.
        is_base: whether the model is still the base model, so no task has been trained.
        device: device of the sums; None means the engine's device.
        damping_quantile: of the mean squares that damps divisions by them.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    batch_size: int
    folder: Path
    is_base: bool
    device: str | None = None
    damping_quantile: float = 0.5

    @property
    def batches(self) -> MicroBatches:
        """The micro-batches of the text."""
        return MicroBatches(self.rows, self.collate, self.batch_size)

    def take(self, engine: Any, layout: Layout, has_moved: bool = False) -> GradientStats:
        """Return the statistics, taken now if they are not in the folder. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine.
            layout: of its model.
            has_moved: whether the weights are those of a checkpoint inside a task.
        Raises:
            UserError: those in the folder are of another model, other weights, other text or another batch size. Or
                there are none, and the model is no longer the base model.
        """
        # Only the base model can give them.
        is_base = self.is_base and not has_moved
        if not is_base and not has_statistics(self.folder):
            raise UserError(
                f"no statistics of the base model in {self.folder}, and the model is no longer the base model: begin "
                "the stream again in another folder"
            )

        # What they are taken of, so that those of other text or weights are not mistaken for them.
        batches = self.batches
        source: dict[str, object] = {"rows": len(self.rows), "batch_size": self.batch_size, "text": digest_of(batches)}
        if is_base:
            source["weights"] = fingerprint_of(engine.module, layout)

        # Take them, or read them.
        if not has_statistics(self.folder):
            stats = collect_statistics(
                engine, batches, needs_sum=False, device=self.device, layout=layout, description="general statistics"
            )
            save_statistics(self.folder, stats, source)
        # Later, the weights that they were taken of are not at hand; the text is.
        return load_statistics(self.folder, layout, False, self.device or engine.device, source)


def general_statistics_of(
    flags: MethodArguments,
    rows: Sequence[Any] | None,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    folder: Path,
    is_base: bool,
) -> GeneralStatistics | None:
    """Return the statistics of general text that flags ask for, or None without rows.

    Args:
        flags: of the method; --general_statistics names the folder.
        rows, collate, is_base: as in GeneralStatistics.
        folder: used if flags name none.
    """
    if rows is None:
        return None

    # The user's folder, if there is one, serves other runs on the same base model too.
    return GeneralStatistics(
        rows=rows,
        collate=collate,
        batch_size=flags.importance_batch_size,
        folder=Path(flags.general_statistics or folder),
        is_base=is_base,
        device="cpu" if flags.statistics_device == "cpu" else None,
        damping_quantile=flags.damping_quantile,
    )


def digest_of(batches: MicroBatches) -> str:
    """Return a digest of the tokens, in order."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes())
    return digest.hexdigest()[:16]
