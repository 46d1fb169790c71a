"""Refuse settings of the best step and of early stopping that do not fit the data, the method or each other."""

from collections.abc import Mapping, Sequence

from transformers import TrainingArguments

from piece_ds.config.settings import Settings
from piece_ds.data.tasks import Task
from piece_ds.evaluation.scorers import get_scorer
from piece_ds.methods.registry import find_method
from piece_ds.runtime.errors import UserError
from piece_ds.training.best_step import LOSS_WITHIN_BUDGET, METRICS, SCORE
from piece_ds.training.validation import rule_of

# Fields of TrainingArguments that decide which step is the best one, and with it the weights.
DECISIVE = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better")

# Schedules that read the measure.
_READ_METRIC = ("reduce_lr_on_plateau", "greedy")


def decides_weights(settings: Settings, arguments: TrainingArguments) -> bool:
    """Return whether evaluations during training decide with which weights a task ends."""
    asked = settings.evaluation
    follows = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)) in _READ_METRIC
    return asked.load_best_model_at_end or asked.early_stopping_patience is not None or follows


def check_best_step(
    settings: Settings, arguments: TrainingArguments, tasks: Sequence[Task], scorers: Mapping[str, str]
) -> None:
    """Raise UserError if a task's best step cannot be found, or cannot be kept.

    Args:
        settings: of the run.
        arguments: of the run.
        tasks: of the stream.
        scorers: task -> name of its scorer.
    """
    # Is anything evaluated, and on rows that are neither trained nor the test's?
    asked, evaluates = settings.evaluation, arguments.eval_strategy != "no"
    for name, given in (
        ("load_best_model_at_end", asked.load_best_model_at_end),
        ("early_stopping_patience", asked.early_stopping_patience is not None),
    ):
        if given and not evaluates:
            raise UserError(
                f"--{name} needs evaluations to choose by: --eval_strategy steps (with --eval_steps) or epoch"
            )
        without = next((task.name for task in tasks if not task.has_validation), None)
        if given and without is not None:
            raise UserError(
                f"--{name} needs held-out rows to choose by, and task {without} has none: give --eval_file (in a "
                "stream eval.json) or --validation_share; test rows are for the result alone"
            )

    # The measure.
    rule = rule_of(settings, arguments)
    if arguments.save_strategy == "best" and (rule is None or not evaluates):
        raise UserError("--save_strategy best needs --metric_for_best_model loss and --eval_strategy steps or epoch")
    if rule is None:
        return
    if evaluates and rule.metric not in METRICS:
        raise UserError(
            f"--metric_for_best_model {rule.metric!r} is not measured while a task trains: use "
            f"{', '.join(METRICS[:-1])} or {METRICS[-1]}"
        )
    if rule.metric == LOSS_WITHIN_BUDGET and rule.budget is None:
        raise UserError(f"--metric_for_best_model {LOSS_WITHIN_BUDGET} needs --forgetting_budget NATS")
    schedule = str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type))
    if rule.metric == LOSS_WITHIN_BUDGET and schedule in _READ_METRIC:
        raise UserError(f"--lr_scheduler_type {schedule} reads one number: use --metric_for_best_model loss or score")
    direction = "max" if rule.greater_is_better else "min"
    if schedule in _READ_METRIC and (arguments.lr_scheduler_kwargs or {}).get("mode", "min") != direction:
        raise UserError(
            f"--lr_scheduler_type {schedule} would take a better {rule.metric} for a worse one: add "
            f'--lr_scheduler_kwargs \'{{"mode": "{direction}"}}\''
        )
    silent = next((task for task in tasks if not get_scorer(scorers[task.name]).generates), None)
    if rule.metric == SCORE and silent is not None:
        raise UserError(
            f"--metric_for_best_model score: task {silent.name} has no score (its scorer is {scorers[silent.name]}); "
            "use loss"
        )
    if asked.load_best_model_at_end:
        _check_can_be_kept(settings, arguments)


def _check_can_be_kept(settings: Settings, arguments: TrainingArguments) -> None:
    """Raise UserError if a method without a mask cannot keep its best step: that takes a whole checkpoint."""
    method = find_method(settings.method.method)
    if method.baseline is None:
        return
    if not method.baseline.resumes_inside:
        raise UserError(
            f"--load_best_model_at_end with --method {method.name} is not supported: without a mask the best step is a "
            "checkpoint, and this method does not resume from one; use a method with a mask, or seqft"
        )
    same_steps = arguments.save_strategy == arguments.eval_strategy and (
        arguments.save_strategy == "epoch" or arguments.save_steps == arguments.eval_steps
    )
    if arguments.save_strategy != "best" and not same_steps:
        raise UserError(
            f"--load_best_model_at_end with --method {method.name} keeps the best step as a whole checkpoint: give "
            "--save_strategy best, or the --save_strategy and --save_steps of the evaluations"
        )
