"""What a task does at the moments of its trainer: before the first step, at each step, and when a signal comes."""

import time
from collections.abc import Callable
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from piece_ds.methods.baseline import EngineCallback
from piece_ds.runtime.signals import stop_asked
from piece_ds.training.trainer import TaskTrainer
from piece_ds.training.validation import Validation


class OnEngine(TrainerCallback):
    """Tells a baseline's EngineCallback, once it has begun, what happens to the trainer."""

    def __init__(self, trainer: Trainer, acts: EngineCallback) -> None:
        self.trainer, self.acts = trainer, acts

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.acts.before_step(self.trainer.model_wrapped)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.acts.end()


class BeforeFirstStep(TrainerCallback):
    """Calls a function when the engine is there and no weight has moved.

    Progress bar and train_runtime count from the function's end.
    """

    def __init__(self, trainer: TaskTrainer, function: Callable[[Any], None]) -> None:
        self.trainer, self.function = trainer, function

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        begin = time.time()
        self.function(self.trainer.model_wrapped)
        self.trainer.seconds_before_first_step = time.time() - begin
        for callback in self.trainer.callback_handler.callbacks:
            bar = getattr(callback, "training_bar", None)
            if bar is not None:
                bar.reset()


class StopAtStep(TrainerCallback):
    """Write a checkpoint after the step and end the training, if a signal asks the run to end."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint and the end of training, if a signal has come."""
        if stop_asked():
            control.should_save = control.should_training_stop = True
        return control


class EvaluateLastStep(TrainerCallback):
    """Evaluate after the last step too, whatever --eval_steps says, if the best step is kept: it may be that one."""

    def __init__(self, validation: Validation | None) -> None:
        self.is_due = validation is not None and validation.loads_best

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for an evaluation after the last step."""
        if self.is_due and state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control
