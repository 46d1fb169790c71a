"""results.json: what the tasks of a run have left so far, and which of them are finished.

Written whole after the model was judged before any task and again after every task, so that it is also the record of
where an interrupted stream goes on.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from piece_ds.config import MethodArguments
from piece_ds.distributed import barrier, is_main
from piece_ds.evaluation import ResultMatrix
from piece_ds.files import write_json
from piece_ds.judge import Scores
from piece_ds.mask_statistics import mask_statistics, overlap, read_index


@dataclass(frozen=True)
class Ledger:
    """The content of results.json.

    Attributes:
        method, ratio: of the run.
        matrix: every measure after every finished task, and before any.
        masks: task -> layer -> module type -> {"selected", "total"}.
        overlaps: Jaccard index of every two tasks' masks, in task order.
        logs: task -> the trainer's log.
        cost: task -> seconds, steps, bytes.
    """

    method: str
    ratio: float
    matrix: ResultMatrix
    masks: dict[str, Any] = field(default_factory=dict)
    overlaps: list[list[float]] = field(default_factory=list)
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cost: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, method: MethodArguments, tasks: list[str], resume: bool) -> "Ledger":
        """What path holds where the run is resumed, else an empty ledger."""
        if resume and path.is_file():
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        return cls(method.method, method.mask_ratio, ResultMatrix(tuple(tasks)))

    @property
    def num_finished(self) -> int:
        return len(self.matrix.loss.after)

    def with_before(self, scores: Scores) -> "Ledger":
        """This ledger with the row before any task."""
        return replace(self, matrix=self.matrix.with_before(scores.accuracy, scores.loss, scores.general_loss))

    def with_task(
        self,
        task: str,
        scores: Scores,
        cost: dict[str, Any],
        index: dict[str, Tensor] | None,
        numel: dict[str, int],
        log: list[dict[str, Any]],
    ) -> "Ledger":
        """This ledger with one more finished task.

        Args:
            index: selected positions per parameter, or None without a mask.
            numel: elements of each parameter.
        """
        masks = self.masks if index is None else {**self.masks, task: mask_statistics(index, numel)}
        return replace(
            self,
            matrix=self.matrix.with_row(scores.accuracy, scores.loss, scores.general_loss),
            masks=masks,
            logs={**self.logs, task: log},
            cost={**self.cost, task: {**cost, "evaluate_seconds": scores.seconds}},
        )

    def with_overlaps(self, mask_files: list[Path]) -> "Ledger":
        """This ledger with the overlap of every two masks; only rank 0 reads them."""
        if not is_main() or not mask_files:
            return self
        masks = [read_index(path)[0] for path in mask_files]
        return replace(self, overlaps=[[overlap(first, second) for second in masks] for first in masks])

    def write(self, path: Path) -> None:
        """Rank 0 writes; all ranks return when the file is there."""
        if is_main():
            write_json(path, self.to_json())
        barrier()

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "piece-results",
            "version": 1,
            "method": self.method,
            "ratio": self.ratio,
            "finished": self.num_finished,
            "matrix": self.matrix.to_json(),
            "masks": self.masks,
            "overlaps": self.overlaps,
            "cost": self.cost,
            "logs": self.logs,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Ledger":
        """The ledger that to_json wrote."""
        matrix = ResultMatrix.from_json(values["matrix"])
        rest = {key: values[key] for key in ("method", "ratio", "masks", "overlaps", "logs", "cost")}
        return cls(matrix=matrix, **rest)
