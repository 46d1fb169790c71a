"""What a flag needs of the others to have an effect: each need met, and not met, and named when it is not."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from piece_ds.preflight.idle_fields import NEEDS, unmet_needs

# As transformers has them when nothing is given, except that nothing is saved.
DEFAULTS: dict[str, Any] = {
    "max_steps": -1,
    "lr_scheduler_type": SchedulerType.LINEAR,
    "optim": OptimizerNames.ADAMW_TORCH_FUSED,
    "gradient_checkpointing": None,
    "logging_strategy": IntervalStrategy.STEPS,
    "eval_strategy": IntervalStrategy.NO,
    "save_strategy": SaveStrategy.NO,
    "train_sampling_strategy": "random",
    "dataloader_num_workers": 0,
    "report_to": [],
    "resume_from_checkpoint": None,
}

Change = dict[str, Any]
SAVES: list[Change] = [{"save_strategy": strategy} for strategy in SaveStrategy if strategy != SaveStrategy.NO]
EVALUATES: list[Change] = [{"eval_strategy": IntervalStrategy.STEPS}, {"eval_strategy": IntervalStrategy.EPOCH}]
CHOOSES: list[Change] = [
    {"lr_scheduler_type": SchedulerType("reduce_lr_on_plateau")},
    {"lr_scheduler_type": SchedulerType("greedy")},
    {"save_strategy": SaveStrategy.BEST},
]
RESUMES: list[Change] = [{"resume_from_checkpoint": value} for value in (True, "True", "true", "1", "yes")]
STARTS_ANEW: list[Change] = [{}, {"resume_from_checkpoint": False}, {"resume_from_checkpoint": "False"}]
TRACKIO: list[Change] = [{"report_to": ["trackio"]}, {"report_to": ["wandb", "trackio"]}, {"report_to": ["all"]}]
NO_TRACKIO: list[Change] = [{}, {"report_to": ["wandb"]}]
CHECKPOINTING: tuple[str, list[Change], list[Change]] = (
    "gradient_checkpointing",
    [{"gradient_checkpointing": True}],
    [{}, {"gradient_checkpointing": False}],
)
STEADY: list[Change] = [
    {"lr_scheduler_type": SchedulerType(name)} for name in ("constant", "reduce_lr_on_plateau", "greedy")
]

# Fields -> words of the need, what meets it, what does not.
OF_FLAGS: dict[str, tuple[str, list[Change], list[Change]]] = {
    "num_train_epochs": ("max_steps -1", [{}], [{"max_steps": 1}]),
    "warmup_steps": ("a schedule that warms up", [{}, {"lr_scheduler_type": SchedulerType.COSINE}], STEADY),
    "gradient_checkpointing_kwargs": CHECKPOINTING,
    "activation_checkpointing_kwargs": CHECKPOINTING,
    "logging_steps": (
        "logging_strategy steps",
        [{}],
        [{"logging_strategy": IntervalStrategy.EPOCH}, {"logging_strategy": IntervalStrategy.NO}],
    ),
    "eval_steps": ("eval_strategy steps", EVALUATES[:1], [{}, *EVALUATES[1:]]),
    "eval_delay": ("eval_strategy steps or epoch", EVALUATES, [{}]),
    "save_steps": (
        "save_strategy steps",
        [{"save_strategy": SaveStrategy.STEPS}],
        [{}, {"save_strategy": SaveStrategy.EPOCH}, {"save_strategy": SaveStrategy.BEST}],
    ),
    "save_total_limit": ("save_strategy or save_steps", SAVES, [{}]),
    "save_on_each_node": ("save_strategy or save_steps", SAVES, [{}]),
    "metric_for_best_model": ("load_best_model_at_end", CHOOSES, [{}, {"save_strategy": SaveStrategy.STEPS}]),
    "greater_is_better": ("load_best_model_at_end", CHOOSES, [{}, {"save_strategy": SaveStrategy.STEPS}]),
    "length_column_name": (
        "train_sampling_strategy group_by_length",
        [{"train_sampling_strategy": "group_by_length"}],
        [{}, {"train_sampling_strategy": "sequential"}],
    ),
    "data_seed": (
        "a train_sampling_strategy that draws",
        [{}, {"train_sampling_strategy": "group_by_length"}],
        [{"train_sampling_strategy": "sequential"}],
    ),
    "dataloader_in_order": ("dataloader_num_workers", [{"dataloader_num_workers": 1}], [{}]),
    "run_name": ("report_to", [{"report_to": ["wandb"]}, {"report_to": ["mlflow", "trackio"]}], [{}]),
    "project": ("report_to trackio", TRACKIO, NO_TRACKIO),
    "trackio_space_id": ("report_to trackio", TRACKIO, NO_TRACKIO),
    "trackio_bucket_id": ("report_to trackio", TRACKIO, NO_TRACKIO),
    "trackio_static_space_id": ("report_to trackio", TRACKIO, NO_TRACKIO),
    "ignore_data_skip": ("resume_from_checkpoint", RESUMES, STARTS_ANEW),
    "restore_callback_states_from_checkpoint": ("resume_from_checkpoint", RESUMES, STARTS_ANEW),
}

AUTO: Change = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")


def optimizer(name: str, params: Change) -> Change:
    return {"optimizer": {"type": name, "params": params}}


def without(option: str) -> Change:
    return optimizer("AdamW", {name: value for name, value in AUTO.items() if name != option})


ADAM, SGD, FIXED = optimizer("AdamW", AUTO), optimizer("SGD", AUTO), {"optimizer": {"type": "AdamW"}}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto"}}}
OWN_WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0}}}

# The same of the DeepSpeed file. If it names an option the flag's value goes there, else the file has one of its own.
OF_FILE: dict[str, tuple[str, list[Change], list[Change]]] = {
    "learning_rate": ('"lr": "auto" in the params', [{}, ADAM, WARMUP], [FIXED, without("lr")]),
    "weight_decay": ('"weight_decay": "auto" in the params', [{}, ADAM, SGD], [FIXED, without("weight_decay")]),
    "adam_beta1": ('"betas": "auto" in the params', [{}, ADAM], [FIXED, without("betas")]),
    "adam_beta2": ('"betas": "auto" in the params', [{}, ADAM], [FIXED, without("betas")]),
    "adam_epsilon": ('"eps": "auto" in the params', [{}, ADAM], [FIXED, without("eps")]),
    "optim": ("a DeepSpeed file without an optimizer", [{}, WARMUP], [ADAM, FIXED]),
    "optim_args": ("a DeepSpeed file without an optimizer", [{}, WARMUP], [ADAM, FIXED]),
    "lr_scheduler_type": ("a DeepSpeed file without a scheduler", [{}, ADAM], [WARMUP, OWN_WARMUP]),
    "lr_scheduler_kwargs": ("a DeepSpeed file without a scheduler", [{}, ADAM], [WARMUP, OWN_WARMUP]),
    "warmup_steps": ('"warmup_num_steps": "auto" in the params', [{}, ADAM, WARMUP], [OWN_WARMUP]),
}


def said(name: str, change: Change, file: Change, keeps_best: bool = False) -> str:
    """What a field needs; empty if it has an effect."""
    deepspeed = SimpleNamespace(config=file)
    arguments: Any = SimpleNamespace(**{**DEFAULTS, **change, "hf_deepspeed_config": deepspeed})
    return unmet_needs(arguments, {name}, keeps_best).get(name, "")


def test_every_need_is_in_a_table_here() -> None:
    assert OF_FLAGS.keys() | OF_FILE.keys() == NEEDS.keys()
    assert unmet_needs(SimpleNamespace(), ["seed", "output_dir"], keeps_best=False) == {}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OF_FLAGS)
def test_what_a_field_needs_of_the_flags_is_said_where_they_do_not_give_it(name: str) -> None:
    words, met, unmet = OF_FLAGS[name]
    for change in met:
        assert said(name, change, {}) == "", change
    for change in unmet:
        assert said(name, change, {}).startswith(words), change


@pytest.mark.parametrize("name", OF_FILE)
def test_what_a_field_needs_of_the_deepspeed_file_is_said_where_it_has_its_own(name: str) -> None:
    words, met, unmet = OF_FILE[name]
    for file in met:
        assert said(name, {}, file) == "", file
    for file in unmet:
        assert said(name, {}, file).startswith(words), file


def test_a_rate_that_the_files_schedule_has_by_itself_is_said_too() -> None:
    assert said("learning_rate", {}, OWN_WARMUP).startswith('"warmup_max_lr": "auto" in the params of the DeepSpeed')
    both = said("learning_rate", {}, {**FIXED, **OWN_WARMUP})
    assert both.startswith('"lr": "auto" in ')
    assert ' and "warmup_max_lr": "auto" in ' in both


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2", "adam_epsilon"])
def test_betas_and_epsilon_need_an_optimizer_of_adams_kind_in_the_file_or_in_the_flag(name: str) -> None:
    for optim in (OptimizerNames.SGD, OptimizerNames.ADAFACTOR, OptimizerNames.RMSPROP, OptimizerNames.ADAGRAD):
        assert said(name, {"optim": optim}, {}) == "an optimizer of Adam's kind", optim
        assert said(name, {"optim": optim}, ADAM) == "", optim  # the file's is what trains
    assert said(name, {}, SGD) == "an optimizer of Adam's kind"
    assert said(name, {"optim": OptimizerNames.ADAMW_TORCH}, {}) == ""


def test_a_best_step_that_the_product_keeps_reads_the_metric() -> None:
    for name in ("metric_for_best_model", "greater_is_better"):
        assert said(name, {}, {}, keeps_best=True) == ""
    assert said("eval_steps", {}, {}, keeps_best=True) == "eval_strategy steps"


def test_a_schedule_of_the_file_warms_up_whatever_the_flag_says() -> None:
    for change in STEADY:
        assert said("warmup_steps", change, WARMUP) == ""
