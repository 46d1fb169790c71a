"""Serve --report_to for a stream: one run of TensorBoard, W&B, MLflow ... for all tasks, with the stream's results.

transformers' Trainer counts its steps from 0 in every task, and its reporters live as long as it does. Each task would
be drawn over the one before (W&B), or be a run of its own without a name (MLflow). Here the reporters live as long as
the stream, and a task's steps count on from those of the earlier tasks.
"""

import copy
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from piece_ds.report.results import RunResults
from piece_ds.runtime.distributed import all_gather_objects
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)

# What the Trainer tells a reporter of a task. Beginning and end of training are the stream's, and not among these.
_EVENTS = (
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_substep_end",
    "on_optimizer_step",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_log",
    "on_save",
)


class StreamReporters:
    """The reporters of one stream. Only the world's first process reports; all of them may call everything."""

    def __init__(self, reporters: Sequence[TrainerCallback], root: Path) -> None:
        """Keep the reporters; each begins with the first event.

        Args:
            reporters: made once for the stream.
            root: the run's folder, for reporters that write files. Its name is the default --run_name.
        """
        self._reporters, self._root = list(reporters), root
        self._last: tuple[TrainingArguments, TrainerState, TrainerControl] | None = None
        self._offset = 0

    def of_task(self, num_steps_before: int) -> TrainerCallback:
        """Return the callback for one task's Trainer, which must have no reporters of its own.

        Args:
            num_steps_before: optimizer steps of all earlier tasks.
        """
        # Reporters see one run: steps count on from the tasks before.
        self._offset = num_steps_before
        return _OfTask(self)

    def log_results(self, results: RunResults) -> None:
        """Report the newest row of the result matrix, at the last step that was trained."""
        if self._last is not None:
            self._call("on_log", *self._last, logs=newest_values(results))

    def close(self, **kwargs: Any) -> None:
        """End the reporters' run. kwargs are what the Trainer would hand over (model, processing_class)."""
        if self._last is None:
            return
        self._call("on_train_end", *self._last, **kwargs)
        self._last = None
        wandb = sys.modules.get("wandb")
        if any(type(reporter).__name__ == "WandbCallback" for reporter in self._reporters) and wandb is not None:
            wandb.finish()  # its reporter leaves the run open, and the next stream would continue in it

    def tell(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass on an event of the task's Trainer, in terms of the stream."""
        of_stream = self._in_stream(args), self._counted_on(state), control

        # The first event of the stream begins the reporters; later tasks do not begin them again.
        is_first, self._last = self._last is None, of_stream
        if is_first:
            self._begin(event, *of_stream, **kwargs)
        elif event == "on_save":
            self._call(event, args, state, control, **kwargs)  # the folder of a checkpoint has the task's step
        elif event != "on_train_begin":
            self._call(event, *of_stream, **kwargs)

    def _begin(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Begin the reporters' runs, before the output folder is claimed. A collective.

        Raises:
            UserError: one of them cannot: a server that is not there, a login or a variable that is missing.
        """
        problem = None
        for reporter in self._reporters:
            try:
                reporter.on_init_end(*args)
                getattr(reporter, event)(*args, **kwargs)
            except Exception as error:  # of a library that this package does not know
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                problem = f"--report_to {_name_of(reporter)} cannot begin ({reason}): mend it, or leave it out"
                break
        problems = [text for text in all_gather_objects(problem) if text]
        if problems:
            raise UserError(str(problems[0]))

    def _call(self, event: str, *args: Any, **kwargs: Any) -> None:
        """Tell all reporters. One that fails is left out from then on: it must not end a run of days."""
        for reporter in list(self._reporters):
            try:
                getattr(reporter, event)(*args, **kwargs)
            except Exception as error:  # of a library that this package does not know
                self._reporters.remove(reporter)
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
                logger.warning("%s has failed, and is told no more: %s", _name_of(reporter), reason)

    def _in_stream(self, args: TrainingArguments) -> TrainingArguments:
        # Copies: the Trainer's own objects must not change.
        of_stream = copy.copy(args)
        of_stream.output_dir = str(self._root)
        of_stream.run_name = args.run_name or self._root.name
        return of_stream

    def _counted_on(self, state: TrainerState) -> TrainerState:
        of_stream = copy.copy(state)
        of_stream.global_step = self._offset + state.global_step
        return of_stream


def _name_of(reporter: TrainerCallback) -> str:
    return type(reporter).__name__.removesuffix("Callback").lower()


def open_reporters(report_to: Sequence[str], root: Path) -> StreamReporters:
    """Return the reporters that TrainingArguments.report_to names.

    Args:
        report_to: names; one text may hold several, separated by commas.
        root: the run's folder.
    Raises:
        UserError: transformers knows no such reporter, or its package is not installed.
    """
    names = [name.strip() for text in report_to for name in text.split(",") if name.strip()]
    made, reason = [], None
    with _without_words_of_deletion():
        try:
            made = [make() for make in integration_utils.get_reporting_integration_callbacks(names)]
        except (ValueError, RuntimeError, ImportError) as error:
            reason = str(error)
    if reason is not None:
        raise UserError(f"--report_to {','.join(names)}: {reason}")
    return StreamReporters(made, root)


@contextmanager
def _without_words_of_deletion() -> Iterator[None]:
    """Print nothing of a failing __del__: some reporters fail there if their package is missing (MLflow, Neptune)."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def newest_values(results: RunResults) -> dict[str, float]:
    """Return the last row of the result matrix, its summary and the last task's cost, by names for reporters.

    The prefix eval_ is the Trainer's own; reporters make a section "eval" of it.
    """
    # Stage -1 is the row before any task.
    matrix, stage = results.matrix, len(results.matrix.loss.after) - 1
    measures = {"score": matrix.score, "loss": matrix.loss}
    found: dict[str, float | None] = {}

    # The row: each task's score and loss.
    for index, task in enumerate(results.tasks):
        for name, measure in measures.items():
            row = measure.before if stage < 0 else measure.after[stage]
            found[f"eval_tasks/{index:02d}-{task}/{name}"] = row[index] if row else None

    # What describes the whole stream.
    found["eval_stream/general_loss"] = matrix.general_loss_before if stage < 0 else matrix.general_loss[stage]
    found |= {f"eval_stream/{name}": value for name, value in matrix.summary().items()}
    moment = "before" if stage < 0 else f"after {results.tasks[stage]}"
    found |= {f"eval_ability/{name}": value for name, value in results.ability.get(moment, {}).items()}
    found |= {f"eval_divergence/{name}": value for name, value in results.divergence.get(moment, {}).items()}

    # What the last task cost.
    if stage >= 0:
        cost = results.cost.get(results.tasks[stage], {})
        found |= {f"eval_cost/{name}": value for name, value in cost.items() if isinstance(value, int | float)}
    return {name: float(value) for name, value in found.items() if value is not None}


def _relay(event: str) -> Callable[..., None]:
    def relay(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.reporters.tell(event, args, state, control, **kwargs)

    return relay


class _TaskCallback(TrainerCallback):
    """Tells the stream's reporters what one task's Trainer says."""

    def __init__(self, reporters: StreamReporters) -> None:
        self.reporters = reporters


_OfTask = type("_OfTask", (_TaskCallback,), {event: _relay(event) for event in ("on_train_begin", *_EVENTS)})
