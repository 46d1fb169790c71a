"""Saved statistics: a folder with one safetensors file per rank and an index, readable by any number of ranks.

With them, another ratio, budget or method (with the same needs) takes a selection, not a second pass over the data.
"""

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field

from piece_ds.checkpoint.artifact import STATISTICS, open_artifact, write_artifact
from piece_ds.checkpoint.metadata import model_fingerprint
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.runtime.schema import Count, read_json, require_file
from piece_ds.runtime.signals import exit_if_signalled, stop_asked
from piece_ds.state.partition import Layout, owned_range
from piece_ds.state.statistics import GradientStats, empty_stats


class PartialStatistics:
    """A StatisticsCheckpoint for collect_statistics(): saves at intervals, and before a signal ends the run."""

    def __init__(self, folder: Path, rounds: int, source: dict[str, object]) -> None:
        """Set where and how often to save.

        Args:
            folder: the task's own; it is removed once the task is finished.
            rounds: rounds of micro-batches (one per rank) between saves. 0 saves only when a signal asks the run to
                end.
            source: what the sums are of. Sums of something else are refused.
        """
        self.folder, self.rounds, self.source = folder, rounds, source
        self._num_rounds = 0

    def begin(self, stats: GradientStats) -> None:
        """Fill stats with the newest saved sums, if there are any."""
        # Rank 0 decides: file systems may show other ranks an older state.
        kept = broadcast_object(self._newest() if is_main() else None)
        if kept is not None:
            load_statistics_into(stats, kept, self.source)

    def is_due(self, num_done: int) -> bool:
        """Return whether to save now: at every interval, and when a signal asks the run to end. A collective."""
        self._num_rounds += 1
        return stop_asked() or (self.rounds > 0 and self._num_rounds % self.rounds == 0)

    def keep(self, stats: GradientStats) -> None:
        """Save the sums, remove older ones, and end the run if a signal asked for it."""
        place = self.folder / f"{stats.num_micro_batches:09d}"
        save_statistics(place, stats, self.source)
        if is_main():
            # The new sums are complete, so older ones are of no use.
            for other in self.folder.iterdir():
                if other != place:
                    shutil.rmtree(other)
        barrier()
        exit_if_signalled(f"after {stats.num_micro_batches} micro-batches of statistics")

    def _newest(self) -> Path | None:
        # Names are padded numbers, so the largest name is the newest.
        complete = [path for path in self.folder.glob("*") if has_statistics(path)]
        return max(complete, default=None)


INDEX, FORMAT, VERSION = "statistics.json", STATISTICS.format, 1


class _Index(BaseModel):
    """Content of statistics.json."""

    format: Literal["piece-statistics"]
    version: Literal[1]
    num_ranks: Annotated[int, Field(ge=1, lt=2**31)]
    has_grad_sum: bool
    num_micro_batches: Count
    num_nonfinite: Count
    model_fingerprint: str
    source: dict[str, Any]
    rows: dict[str, tuple[Count, Count]] = {}  # parameters of which only some rows are eligible


def save_statistics(folder: Path | str, stats: GradientStats, source: dict[str, object] | None = None) -> None:
    """Write all ranks' statistics into folder. A collective; rank 0 writes the index last.

    Args:
        folder: seen by all ranks.
        stats: this rank's.
        source: what they are of (data file, batch size, ...). load_statistics() compares it.
    """
    folder, layout = Path(folder), stats.layout
    # Copies, as safetensors refuses views that share memory.
    tensors = {}
    for info, part, offset in layout.owned():
        grad_sum, square_sum = stats.fragment(offset, part.numel)
        tensors[f"{info.name}.square_sum"] = square_sum.cpu().clone()
        if grad_sum is not None:
            tensors[f"{info.name}.grad_sum"] = grad_sum.cpu().clone()
    write_artifact(folder / _shard(layout.rank, layout.num_ranks), STATISTICS, tensors, {})
    barrier()

    # The index comes last: a folder with an index is complete.
    if is_main():
        write_json(
            folder / INDEX,
            {
                "format": FORMAT,
                "version": VERSION,
                "num_ranks": layout.num_ranks,
                "has_grad_sum": stats.grad_sum is not None,
                "num_micro_batches": stats.num_micro_batches,
                "num_nonfinite": stats.num_nonfinite,
                "model_fingerprint": model_fingerprint(layout),
                "source": source or {},
                "rows": _rows(layout),
            },
        )
    barrier()


def has_statistics(folder: Path | str) -> bool:
    """Return whether save_statistics() has finished."""
    return (Path(folder) / INDEX).is_file()


def forget_statistics(folder: Path | str) -> None:
    """Make a folder's statistics count as missing, so that new ones never stand beside an old index. A collective."""
    if is_main():
        (Path(folder) / INDEX).unlink(missing_ok=True)
    barrier()


def source_of(folder: Path | str) -> dict[str, Any]:
    """Return what the statistics in a folder are of, as save_statistics() was told.

    Raises:
        UserError: there are none, or their index is damaged.
    """
    return _read_index(Path(folder)).source


def load_statistics(
    folder: Path | str,
    layout: Layout,
    needs_sum: bool,
    device: torch.device | str = "cpu",
    source: dict[str, object] | None = None,
) -> GradientStats:
    """Return this rank's statistics from a folder written by any number of ranks.

    Args:
        folder: of save_statistics().
        layout: of the model, for this rank.
        needs_sum: whether sums of gradients are needed besides sums of squares.
        device: where the sums go.
        source: what they must be of: every entry is compared with the folder's. None accepts anything.
    Raises:
        UserError: see load_statistics_into().
    """
    stats = empty_stats(layout, needs_sum, device)
    load_statistics_into(stats, folder, source)
    return stats


def load_statistics_into(stats: GradientStats, folder: Path | str, source: dict[str, object] | None = None) -> None:
    """Fill stats with this rank's statistics from a folder written by any number of ranks.

    Raises:
        UserError: the folder has no statistics, or they are damaged, of another model or source, or lack the sum that
            stats needs.
    Cost: reads the shards that overlap this rank's part, once for their checksums and once for the sums.
    """
    folder, layout = Path(folder), stats.layout
    index = _read_index(folder)
    if index.model_fingerprint != model_fingerprint(layout):
        raise UserError(f"statistics in {folder} are of another model: parameter names or shapes differ")
    if index.rows != _rows(layout):
        raise UserError(
            f"statistics in {folder} are of rows {index.rows or 'all'} of the model's parameters, expected "
            f"{_rows(layout) or 'all'}: use another folder, or the same --eligible"
        )
    if stats.grad_sum is not None and not index.has_grad_sum:
        raise UserError(f"statistics in {folder} hold only sums of squares: piece-s needs the sum of gradients too")
    differing = {key: value for key, value in (source or {}).items() if index.source.get(key) != value}
    if differing:
        found = {key: index.source.get(key, "unknown") for key in differing}
        raise UserError(f"statistics in {folder} were taken of {found}, not of {differing}: use another folder")
    for owner in range(index.num_ranks):
        _fill_from_shard(stats, folder / _shard(owner, index.num_ranks), owner, index.num_ranks)
    stats.num_micro_batches, stats.num_nonfinite = index.num_micro_batches, index.num_nonfinite


def _rows(layout: Layout) -> dict[str, tuple[int, int]]:
    return {info.name: info.rows for info in layout.eligible() if info.rows is not None}


def _read_index(folder: Path) -> _Index:
    if not has_statistics(folder):
        raise UserError(f"no statistics in {folder}: expected the file {INDEX}")
    return read_json(folder / INDEX, _Index, STATISTICS.what, STATISTICS.remedy)


def _fill_from_shard(stats: GradientStats, path: Path, owner: int, num_ranks: int) -> None:
    """Fill the part of stats that rank `owner` of num_ranks has written to path."""
    require_file(path, STATISTICS.what, STATISTICS.remedy)  # all are there, so a wrong num_ranks ends at once

    # Find the ranges that the writer and this rank have in common, parameter by parameter.
    overlaps = []
    for info, part, offset in stats.layout.owned():
        stored = owned_range(info, owner, num_ranks)
        low, high = max(part.start, stored.start), min(part.stop, stored.stop)
        if low < high:
            targets = stats.fragment(offset + low - part.start, high - low)
            overlaps += [
                (f"{info.name}.{key}", target, low - stored.start, high - stored.start)
                for key, target in zip(("grad_sum", "square_sum"), targets, strict=True)
                if target is not None
            ]
    if not overlaps:
        return

    # Read only those.
    with open_artifact(path, STATISTICS) as file:
        for name, target, low, high in overlaps:
            values = file.part(name, low, high)
            if values.dtype != torch.float32:
                raise file.refuse(f"{name!r} holds {values.dtype}, expected float32")
            target.copy_(values)


def _shard(owner: int, num_ranks: int) -> str:
    return f"statistics-{owner:05d}-of-{num_ranks:05d}.safetensors"
