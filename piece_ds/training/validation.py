"""Evaluate a task on its held-out rows while it trains, and keep the selected weights of its best step.

The loss is exact: the sum over all answer tokens divided by their number, for any number of ranks and any batch size.
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor
from transformers import TrainerState, TrainingArguments

from piece_ds.checkpoint.best_file import load_best, save_best
from piece_ds.config.settings import Settings
from piece_ds.data.image_collate import make_collator
from piece_ds.data.tasks import Task
from piece_ds.evaluation.evaluate import score_task
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.models.processor import Processing
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.signals import exits_deferred
from piece_ds.state.mask import Mask
from piece_ds.training.best_step import (
    GENERAL_BEFORE,
    LOSS,
    LOSS_WITHIN_BUDGET,
    SCORE,
    Evaluation,
    Rule,
    best_of,
    evaluations_in,
)
from piece_ds.zero.weights import read_selected, write_selected_

logger = logging.getLogger(__name__)

BEST_NAME = "best.safetensors"


def rule_of(settings: Settings, arguments: TrainingArguments) -> Rule | None:
    """Return what makes one step of a task better than another; None if no setting asks.

    Args:
        settings: of the run.
        arguments: of the run, for metric_for_best_model.
    """
    asked = settings.evaluation
    metric = (arguments.metric_for_best_model or "").removeprefix("eval_")
    if not (asked.load_best_model_at_end or asked.early_stopping_patience or metric):
        return None
    metric = metric or LOSS
    greater = arguments.greater_is_better
    return Rule(
        metric=metric,
        greater_is_better=metric == SCORE if greater is None else greater,
        budget=settings.method.forgetting_budget,
        patience=asked.early_stopping_patience,
        threshold=asked.early_stopping_threshold,
    )


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The rows that a task is evaluated on while it trains, and what is measured on them.

    Attributes:
        task: with its eval rows as test rows.
        tokenizer: the model's, or its processor.
        settings: of the run.
        scorer: name of the task's.
        batch_size: rows of a batch on each rank.
        rule: what makes a step the best; None if nothing asks.
        general: general text whose loss the budget is about; None unless the rule needs it.
        loads_best: whether the task ends with the weights of its best step.
    """

    task: Task
    tokenizer: Processing
    settings: Settings
    scorer: str
    batch_size: int
    rule: Rule | None
    general: datasets.Dataset | None
    loads_best: bool

    def measure(self, engine: Any) -> dict[str, float]:
        """Return what the trainer logs of the model as it is now, under its names. A collective."""
        begin = time.perf_counter()
        metric = self.rule.metric if self.rule is not None else LOSS
        with exits_deferred():
            found = {"eval_loss": self._loss(engine, self.task.test)}
            if metric == SCORE:
                options = (self.task, self.scorer, self.batch_size, self.settings, engine.device)
                found["eval_score"] = score_task(engine, self.tokenizer, *options)[1]["score"]
            if metric == LOSS_WITHIN_BUDGET:
                found["eval_general_loss"] = self._general_loss(engine)
        return {**found, "eval_runtime": round(time.perf_counter() - begin, 4)}

    def measure_before(self, engine: Any) -> dict[str, float]:
        """Return what must be known of the model before the task's first step, for the trainer's log. A collective."""
        if self.general is None:
            return {}
        with exits_deferred():
            return {GENERAL_BEFORE: self._general_loss(engine)}

    def _general_loss(self, engine: Any) -> float:
        assert self.general is not None
        return self._loss(engine, self.general)

    def _loss(self, engine: Any, rows: datasets.Dataset) -> float:
        return evaluate_loss(engine, rows, make_collator(self.tokenizer), self.batch_size, engine.device).mean


class BestStep:
    """Follows the evaluations of one task, and keeps the selected weights of its best step.

    Attributes:
        mask: the task's, once selected; None for a method without one, whose trainer's checkpoints keep the weights.
    """

    mask: Mask | None = None

    def __init__(self, validation: Validation) -> None:
        self.validation = validation
        self._values: dict[str, Tensor] = {}
        self._step: int | None = None  # of the values

    def note(self, engine: Any, state: TrainerState) -> bool:
        """Keep the weights if the evaluation just logged is the best one; return whether it is. A collective.

        Memory: this rank's part of the selected weights.
        """
        best, _ = self._best(state)
        if best is None or best.step != state.global_step:
            return False
        if self.validation.loads_best and self.mask is not None:
            self._values, self._step = read_selected(engine.module, self.mask), best.step
        return True

    def is_exhausted(self, state: TrainerState) -> bool:
        """Return whether as many evaluations in a row were no gain as --early_stopping_patience allows."""
        rule = self.validation.rule
        return rule is not None and rule.patience is not None and self._best(state)[1] >= rule.patience

    def save(self, folder: Path, engine: Any) -> None:
        """Write the kept weights into a checkpoint's folder, if there are any. A collective."""
        if self._step is not None and self.mask is not None:
            dtype_of = {name: param.dtype for name, param in engine.module.named_parameters()}
            save_best(folder / BEST_NAME, self.mask, self._values, dtype_of, self._step)

    def load(self, folder: Path, state: TrainerState) -> None:
        """Read what save() wrote, for a resumed task.

        Raises:
            UserError: the file is damaged, or is not of the best step that the checkpoint's log names.
        """
        best, _ = self._best(state)
        if best is None or self.mask is None or not self.validation.loads_best:
            return
        self._step, self._values = load_best(folder / BEST_NAME, self.mask)
        if self._step != best.step:
            raise UserError(
                f"{folder / BEST_NAME} is of step {self._step}, the checkpoint's log says {best.step}: resume from an "
                "earlier checkpoint"
            )

    def restore(self, engine: Any, state: TrainerState) -> None:
        """Write the kept weights into the model, and say which step they are of. A collective.

        Args:
            engine: after training, with no update attached.
            state: of the trainer.
        """
        if not self.validation.loads_best or self.mask is None:
            return
        best, _ = self._best(state)
        if best is None:
            logger.warning("task %s: no evaluation was finite, so its last step is kept", self.validation.task.name)
            return
        if best.step != state.global_step:
            write_selected_(engine.module, self.mask, self._values)

    def result(self, state: TrainerState) -> dict[str, Any]:
        """Return JSON-ready: the curve, the best step, and the step whose weights the task ends with."""
        evaluations, rule = evaluations_in(state.log_history), self.validation.rule
        best, _ = self._best(state)
        used = best.step if self.validation.loads_best and best is not None else state.global_step
        return {
            "rows": len(self.validation.task.test),
            "metric": rule.metric if rule is not None else LOSS,
            "best_step": None if best is None else best.step,
            "used_step": used,
            "last_step": state.global_step,
            "stopped_early": self.is_exhausted(state),
            "curve": [evaluation.to_json() for evaluation in evaluations],
        }

    def _best(self, state: TrainerState) -> tuple[Evaluation | None, int]:
        return best_of(evaluations_in(state.log_history), self.validation.rule or Rule())
