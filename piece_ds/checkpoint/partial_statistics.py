"""Sums of a pass over the data that has not finished, kept so that an interrupted run does not begin it again.

Every keeping goes to a folder of its own, FOLDER/000123 after 123 micro-batches, and only then the one before it is
removed: whatever interrupts it, one complete set is there.
"""

import shutil
from pathlib import Path

from piece_ds.checkpoint.statistics_file import has_statistics, load_statistics_into, save_statistics
from piece_ds.distributed import barrier, broadcast_object, is_main
from piece_ds.state.statistics import GradientStats
from piece_ds.stop import leave_if_asked, stop_asked


class PartialStatistics:
    """A Keeper for collect_statistics(): keeps at intervals, and before a signal ends the run."""

    def __init__(self, folder: Path, rounds: int, source: dict[str, object]) -> None:
        """
        Args:
            folder: the task's own; removed by forget().
            rounds: of micro-batches (one a rank) between keepings; 0 keeps only when a signal asks the run to end.
            source: what the sums are of; sums of something else are refused.
        """
        self.folder, self.rounds, self.source = folder, rounds, source
        self._num_rounds = 0

    def begin(self, stats: GradientStats) -> None:
        """Fill stats with the newest sums kept, if there are any."""
        kept = broadcast_object(self._newest() if is_main() else None)
        if kept is not None:
            load_statistics_into(stats, kept, self.source)

    def is_due(self, num_done: int) -> bool:
        """At every interval, and when a signal asks the run to end. A collective."""
        self._num_rounds += 1
        return stop_asked() or (self.rounds > 0 and self._num_rounds % self.rounds == 0)

    def keep(self, stats: GradientStats) -> None:
        """Write them, remove the ones before, and end the run where that was asked."""
        place = self.folder / f"{stats.num_micro_batches:09d}"
        save_statistics(place, stats, self.source)
        if is_main():
            for other in self.folder.iterdir():
                if other != place:
                    shutil.rmtree(other)
        barrier()
        leave_if_asked(f"after {stats.num_micro_batches} micro-batches of statistics")

    def forget(self) -> None:
        """The sums have been used."""
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _newest(self) -> Path | None:
        complete = [path for path in self.folder.glob("*") if has_statistics(path)]
        return max(complete, default=None)
