"""What a run makes of steps whose loss or gradient was NaN or infinite: they are named, counted, and end it or not."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from piece_ds.runtime.distributed import all_gather_objects, is_main
from piece_ds.runtime.errors import MachineError
from piece_ds.training.metrics import MetricsLog
from piece_ds.training.trainer import TaskTrainer
from piece_ds.zero.step_watch import SkippedStep, StepWatch
from piece_ds.zero.supported import adapter_for

logger = logging.getLogger(__name__)

# Events of metrics.jsonl: steps not taken because of NaN or infinity; because fp16's dynamic loss scale was too large.
NONFINITE, OVERFLOW = "nonfinite", "overflow"


class NonfiniteError(MachineError):
    """A loss or gradient was NaN or infinite, and the run was to stop then. Weights are those of the step before."""


@dataclass(frozen=True)
class _Report:
    """What one rank knows of a step that was not taken.

    Attributes:
        fault: in its share of the reduced gradient.
        losses: (micro-batch of the step, loss) that was NaN or infinite on it.
        is_local_finite: whether its own part of the gradient was finite; None where that is unknown.
    """

    fault: SkippedStep
    losses: list[tuple[int, float]]
    is_local_finite: bool | None


class NonfiniteCallback(TrainerCallback):
    """Looks at every step's end whether the step was taken. Add it before what acts on the reduced gradient."""

    def __init__(self, trainer: TaskTrainer, task: str, policy: str, metrics: MetricsLog) -> None:
        """
        Args:
            trainer: of the task; its update watches the steps, and without one the engine is watched here.
            task: the task's name.
            policy: 'stop' or 'skip'.
            metrics: where steps that were not taken are noted.
        """
        self._trainer, self._task, self._policy, self._metrics = trainer, task, policy, metrics
        self._watch: StepWatch | None = None

    def watch_engine(self) -> None:
        """For a method without a mask: watch the trainer's engine, which must exist."""
        self._watch = StepWatch(adapter_for(self._trainer.model_wrapped))
        self._watch.install()  # the engine does not outlive the task

    @property
    def watch(self) -> StepWatch | None:
        """Of the engine's steps, once training has begun."""
        return self._watch if self._trainer.update is None else self._trainer.update.watch

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer.losses.clear()
        if self.watch is not None:
            self.watch.take_charge()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        update, watch = self._trainer.update, self.watch
        if watch is None or watch.fault is None:
            return
        local = update.is_local_finite() if update is not None else None
        gathered: Any = all_gather_objects(_Report(watch.fault, self._nonfinite_losses(), local))
        if all(report.fault.may_recover and not report.losses for report in gathered):
            self._metrics.note(OVERFLOW)
            return
        shown = _shown(gathered, watch.replicated)
        self._metrics.note(NONFINITE, found=shown)
        found = f"step {state.global_step} of task {self._task}: {shown}"
        if self._policy == "stop":
            raise NonfiniteError(
                f"{found}; the step was not taken. Lower --learning_rate, mend the data, or leave "
                "such steps out with --nonfinite skip (a run with checkpoints goes on from the last "
                "one: --resume_from_checkpoint True)"
            )
        if is_main():
            logger.warning("%s; the step was not taken (%d so far)", found, self._metrics.count(NONFINITE))

    def _nonfinite_losses(self) -> list[tuple[int, float]]:
        losses = [float(loss) for loss in torch.stack(self._trainer.losses)] if self._trainer.losses else []
        return [(number, loss) for number, loss in enumerate(losses, 1) if not torch.tensor(loss).isfinite()]


def _shown(reports: list[_Report], replicated: bool) -> str:
    """Return what was wrong, in words: entries and the first of them, then where it came from."""
    firsts = [report.fault.first for report in reports if report.fault.first is not None]
    counts = [report.fault.num_entries for report in reports]
    num_entries = counts[0] if replicated else sum(counts)
    what = "the norm of the gradient is infinite, its entries are finite"
    if firsts:
        name, index = firsts[0]
        what = f"{num_entries} entries of the gradient are NaN or infinite, the first {name}[{index}] (flat index)"
    losses = [
        f"{loss} on rank {rank}, micro-batch {number}"
        for rank, report in enumerate(reports)
        for number, loss in report.losses
    ]
    if losses:
        return f"the loss is {losses[0]}{f' and {len(losses) - 1} more' if len(losses) > 1 else ''}; {what}"
    ranks = ", ".join(str(rank) for rank, report in enumerate(reports) if report.is_local_finite is False)
    return f"{what}; every loss is finite{f'; the gradient of rank {ranks} is not' if ranks else ''}"
