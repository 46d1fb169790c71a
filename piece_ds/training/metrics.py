"""Write metrics.jsonl: what happens in a task, line by line, as it happens.

A line is a row of the Trainer's log with the cost of its steps, or an event. If an interrupted task resumes from a
checkpoint, it keeps the lines up to there, so no step appears twice.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from piece_ds.runtime.distributed import all_reduce_sum_, collective_device, is_main
from piece_ds.runtime.files import not_written, write_text
from piece_ds.runtime.profiling import host_peak_bytes, peak_bytes, take_seconds
from piece_ds.runtime.rank_status import report_status
from piece_ds.training.trainer import TaskTrainer

METRICS_NAME = "metrics.jsonl"

# What comes after the last step, and is done again if a task is finished again.
_AFTER_TRAINING = {"training", "saving", "evaluation after"}

Row = dict[str, Any]


class MetricsLog(TrainerCallback):
    """Writes a task's metrics.jsonl on rank 0. All ranks must make the same calls."""

    def __init__(self, path: Path, trainer: TaskTrainer) -> None:
        self.rows: list[Row] = []  # of rank 0
        self.train_seconds = 0.0  # between every step's begin and end
        self._path, self._trainer = path, trainer
        self._begin = 0.0
        self._seconds_logged = 0.0
        self._num_tokens = 0

    def open(self, last_step: int | None) -> None:
        """Begin the file, or continue it.

        Args:
            last_step: step of the checkpoint to continue from; None begins anew. Later lines and an incomplete one are
                removed.
        """
        if is_main():
            self.rows = [] if last_step is None else [row for row in _read(self._path) if _is_kept(row, last_step)]
            self._write_all()

    def note(self, event: str, **values: Any) -> None:
        """Write a line for an event. It replaces a line of the same event at the same step."""
        row = {"event": event, "step": self._trainer.state.global_step, **values}

        # A task that is finished again repeats its last events.
        same = [old for old in self.rows if (old.get("event"), old["step"]) == (event, row["step"])]
        if same and is_main():
            self.rows = [old for old in self.rows if old not in same]
            self._write_all()
        self._append(row)

    def count(self, event: str) -> int:
        """Return the number of lines of an event so far, on rank 0, including those before an interruption."""
        return sum(row.get("event") == event for row in self.rows)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock, and tell the other ranks' watch where this one is."""
        report_status(f"step {state.global_step + 1} of {self._path.parent.name}")
        self._begin = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the step's clock."""
        self.train_seconds += time.perf_counter() - self._begin

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Write a line for the checkpoint, with its seconds."""
        self.note("checkpoint", seconds=take_seconds("saving"))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the Trainer's newest log row, with the cost of its steps."""
        row = dict(state.log_history[-1])
        if "loss" in row:
            row |= self._cost(row.get("general_tokens"))
        self._append(row)

    def _cost(self, beside: int | None) -> Row:
        """Return the cost of the steps since the last log. A collective of one number.

        Args:
            beside: tokens of general text in these steps, over all ranks; None without it.
        """
        own = self._take_num_tokens()
        seconds, self._seconds_logged = self.train_seconds - self._seconds_logged, self.train_seconds

        # What a machine cannot tell is left out.
        cost = {
            "train_seconds": seconds,
            "tokens": own,
            "tokens_per_second": (own + (beside or 0)) / seconds if seconds else None,
            "general_tokens_per_second": beside / seconds if seconds and beside is not None else None,
            "host_peak_bytes": host_peak_bytes(),
            "peak_bytes": peak_bytes(),
        }
        return {name: value for name, value in cost.items() if value is not None}

    def tokens_per_second(self) -> tuple[float | None, float | None]:
        """Return trained tokens of all ranks per second of steps: general text's included, and only its. A collective.

        Only steps of this process count; None if it took none, or without general text.
        """
        self._take_num_tokens()
        general = self._trainer.general
        if general is not None:
            general.take_row()  # of the steps since the last log
        if not self.train_seconds:
            return None, None
        beside = 0 if general is None else general.num_tokens
        of_general = None if general is None else beside / self.train_seconds
        return (self._num_tokens + beside) / self.train_seconds, of_general

    def _take_num_tokens(self) -> int:
        """Return the task's tokens of all ranks since the last call. A collective."""
        number = int(all_reduce_sum_(self._trainer.take_num_tokens().to(collective_device()).view(1)))
        self._num_tokens += number
        return number

    def _append(self, row: Row) -> None:
        if not is_main():
            return
        self.rows.append(row)
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(row))  # one write: what a killed process leaves is a whole line
        except OSError as error:
            raise not_written(self._path, error) from error

    def _write_all(self) -> None:
        write_text(self._path, "".join(map(_line, self.rows)))


def _read(path: Path) -> list[Row]:
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _is_kept(row: Row, last_step: int) -> bool:
    of_the_end = row.get("event") in _AFTER_TRAINING or "train_runtime" in row
    return row["step"] <= last_step and not of_the_end


def finite(row: Row) -> Row:
    """Return row without NaN and infinity, which JSON cannot express. A skipped step has an infinite norm."""
    return {key: value for key, value in row.items() if not isinstance(value, float) or math.isfinite(value)}


def _line(row: Row) -> str:
    return json.dumps(finite(row)) + "\n"
