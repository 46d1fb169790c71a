"""Handle steps whose loss or gradient was NaN or infinite: name them, count them, and end the run or not."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from piece_ds.runtime.distributed import all_gather_objects, is_main
from piece_ds.runtime.errors import MachineError
from piece_ds.training.checkpoints import last_checkpoint, step_of
from piece_ds.training.metrics import MetricsLog
from piece_ds.training.trainer import TaskTrainer
from piece_ds.zero.step_watch import SkippedStep, StepWatch
from piece_ds.zero.supported import adapter_for

logger = logging.getLogger(__name__)

# Events of metrics.jsonl: steps skipped for NaN or infinity, and for too large a dynamic loss scale of fp16.
NONFINITE, OVERFLOW = "nonfinite", "overflow"


class NonfiniteError(MachineError):
    """A loss or gradient was NaN or infinite, and the run was to stop then. Weights are those before the step."""


@dataclass(frozen=True)
class _Report:
    """What one rank knows of a skipped step.

    Attributes:
        fault: in its share of the reduced gradient.
        losses: (micro-batch of the step, loss) of each loss that was NaN or infinite on it.
        is_local_finite: whether its own part of the gradient was finite; None if that is unknown.
    """

    fault: SkippedStep
    losses: list[tuple[int, float]]
    is_local_finite: bool | None


class NonfiniteCallback(TrainerCallback):
    """Check at every step's end whether the step was taken. Add it before what acts on the reduced gradient."""

    def __init__(
        self, trainer: TaskTrainer, task: str, policy: str, metrics: MetricsLog, *, resumes_inside: bool = True
    ) -> None:
        """Keep what it needs; watching begins with the first step.

        Args:
            trainer: of the task. Its update watches the steps; without one, call watch_engine().
            task: the task's name.
            policy: 'stop' or 'skip'.
            metrics: where skipped steps are noted.
            resumes_inside: whether an interrupted task resumes from a checkpoint.
        """
        self._resumes_inside = resumes_inside
        self._trainer, self._task, self._policy, self._metrics = trainer, task, policy, metrics
        self._watch: StepWatch | None = None

    def watch_engine(self) -> None:
        """Watch the trainer's engine, which must exist. For a method without a mask."""
        self._watch = StepWatch(adapter_for(self._trainer.model_wrapped))
        self._watch.install()  # the engine does not outlive the task

    @property
    def watch(self) -> StepWatch | None:
        """The watch of the engine's steps, once training has begun."""
        return self._watch if self._trainer.update is None else self._trainer.update.watch

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forget the last step's losses, and decide from now on what a fault leads to."""
        self._trainer.losses.clear()
        if self.watch is not None:
            self.watch.take_charge()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report a skipped step. A collective if there was a fault, which all ranks have.

        Raises:
            NonfiniteError: the policy is 'stop', and the fault is not one that fp16's loss scale corrects.
        """
        update, watch = self._trainer.update, self.watch
        if watch is None or watch.fault is None:
            return

        # Every rank knows its share only. Together they know what was wrong, and decide alike.
        local = update.is_local_finite() if update is not None else None
        gathered: Any = all_gather_objects(_Report(watch.fault, self._nonfinite_losses(), local))

        # fp16's dynamic loss scale was too large, which it corrects by itself.
        if all(report.fault.may_recover and not report.losses for report in gathered):
            self._metrics.note(OVERFLOW)
            return

        # Anything else will not go away: stop, or warn and skip.
        shown = _shown(gathered, watch.replicated)
        self._metrics.note(NONFINITE, found=shown)
        found = f"step {state.global_step} of task {self._task}: {shown}"
        if self._policy == "stop":
            raise NonfiniteError(
                f"{found}; the step was not taken, and the run ends. Lower --learning_rate, mend the data, or leave "
                f"such steps out with --nonfinite skip{self._way_back(Path(args.output_dir))}"
            )
        if is_main():
            logger.warning("%s; the step was not taken (%d so far)", found, self._metrics.count(NONFINITE))

    def _way_back(self, folder: Path) -> str:
        """Return from where a new run of the same command could resume, as the end of a sentence. A collective."""
        checkpoint = last_checkpoint(folder) if self._resumes_inside else None
        if checkpoint is None:
            return ""
        return f"; --resume_from_checkpoint True then begins at step {step_of(checkpoint)}"

    def _nonfinite_losses(self) -> list[tuple[int, float]]:
        losses = [float(loss) for loss in torch.stack(self._trainer.losses)] if self._trainer.losses else []
        return [(number, loss) for number, loss in enumerate(losses, 1) if not torch.tensor(loss).isfinite()]


def _shown(reports: list[_Report], replicated: bool) -> str:
    """Return what was wrong, in words: entries and the first of them, then where it came from."""
    # The entries. If ranks hold the whole gradient, each has counted the same ones.
    firsts = [report.fault.first for report in reports if report.fault.first is not None]
    counts = [report.fault.num_entries for report in reports]
    num_entries = counts[0] if replicated else sum(counts)
    what = "the norm of the gradient is infinite, its entries are finite"
    if firsts:
        name, index = firsts[0]
        what = f"{num_entries} entries of the gradient are NaN or infinite, the first {name}[{index}] (flat index)"

    # Where they came from: a loss, or a rank's gradient.
    losses = [
        f"{loss} on rank {rank}, micro-batch {number}"
        for rank, report in enumerate(reports)
        for number, loss in report.losses
    ]
    if losses:
        return f"the loss is {losses[0]}{f' and {len(losses) - 1} more' if len(losses) > 1 else ''}; {what}"
    ranks = ", ".join(str(rank) for rank, report in enumerate(reports) if report.is_local_finite is False)
    return f"{what}; every loss is finite{f'; the gradient of rank {ranks} is not' if ranks else ''}"
