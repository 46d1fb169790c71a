"""Name settings that have no effect because of others, so that the run can say so.

docs/training-arguments.md shows this table too.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments


@dataclass(frozen=True)
class Need:
    """What a field needs to have an effect.

    Attributes:
        text: what to set, to be read after "needs".
        is_met: whether it is set.
    """

    text: str
    is_met: Callable[[TrainingArguments], bool]


def _is(name: str, *values: str) -> Callable[[TrainingArguments], bool]:
    return lambda arguments: _plain(getattr(arguments, name)) in values


def _is_not(name: str, *values: str) -> Callable[[TrainingArguments], bool]:
    return lambda arguments: _plain(getattr(arguments, name)) not in values


def _chooses_a_best(arguments: TrainingArguments) -> bool:
    # The product's own --load_best_model_at_end and --early_stopping_patience are asked for elsewhere.
    by_metric = _plain(arguments.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy")
    return by_metric or _plain(arguments.save_strategy) == "best"


def _reports(*names: str) -> Callable[[TrainingArguments], bool]:
    return lambda arguments: bool(set(arguments.report_to) & set(names) if names else arguments.report_to)


def _resumes(arguments: TrainingArguments) -> bool:
    return str(arguments.resume_from_checkpoint).lower() in ("true", "1", "yes")


def _no_optimizer_in_file(arguments: TrainingArguments) -> bool:
    return not arguments.hf_deepspeed_config.config.get("optimizer")


def _no_schedule_in_file(arguments: TrainingArguments) -> bool:
    return not arguments.hf_deepspeed_config.config.get("scheduler")


def _in_file(option: str) -> Need:
    """Return the need of a flag that a DeepSpeed file's optimizer takes only if its params name the option."""

    def is_met(arguments: TrainingArguments) -> bool:
        section = arguments.hf_deepspeed_config.config.get("optimizer")
        return not isinstance(section, dict) or option in (section.get("params") or {})

    return Need(f'"{option}": "auto" in the params of the DeepSpeed file\'s optimizer', is_met)


def _is_fixed_by_schedule(arguments: TrainingArguments, option: str) -> bool:
    """Return whether a schedule of the DeepSpeed file has its own value of what a flag would give it by "auto"."""
    section = arguments.hf_deepspeed_config.config.get("scheduler")
    return isinstance(section, dict) and option not in (section.get("params") or {})


def _in_schedule(option: str) -> Need:
    return Need(
        f'"{option}": "auto" in the params of the DeepSpeed file\'s scheduler',
        lambda arguments: not _is_fixed_by_schedule(arguments, option),
    )


# Optimizers that take neither betas nor epsilon of the flags.
_NOT_ADAM = (
    *("sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "adafactor"),
    *("galore_adafactor", "galore_adafactor_layerwise", "lomo", "adalomo", "schedule_free_sgd"),
)


def _takes_betas(arguments: TrainingArguments) -> bool:
    in_file = arguments.hf_deepspeed_config.config.get("optimizer")
    name = in_file.get("type") if isinstance(in_file, dict) else _plain(arguments.optim)
    return str(name).lower() not in _NOT_ADAM


_ADAM = Need("an optimizer of Adam's kind", _takes_betas)
_CHECKPOINTING = Need("gradient_checkpointing", lambda arguments: bool(arguments.gradient_checkpointing))
_BEST = Need(
    "load_best_model_at_end, early_stopping_patience, save_strategy best or lr_scheduler_type reduce_lr_on_plateau or "
    "greedy",
    _chooses_a_best,
)
_CHECKPOINTS = Need("save_strategy or save_steps", _is_not("save_strategy", "no"))
_TRACKIO = Need("report_to trackio", _reports("trackio", "all"))
_RESUMED = Need("resume_from_checkpoint", _resumes)

NEEDS: dict[str, tuple[Need, ...]] = {
    "num_train_epochs": (Need("max_steps -1", lambda arguments: arguments.max_steps < 0),),
    "warmup_steps": (
        Need(
            "a schedule that warms up, which constant, reduce_lr_on_plateau and greedy do not",
            lambda arguments: bool(
                arguments.hf_deepspeed_config.config.get("scheduler")
                or _plain(arguments.lr_scheduler_type) not in ("constant", "reduce_lr_on_plateau", "greedy")
            ),
        ),
        _in_schedule("warmup_num_steps"),
    ),
    "lr_scheduler_type": (Need("a DeepSpeed file without a scheduler", _no_schedule_in_file),),
    "lr_scheduler_kwargs": (Need("a DeepSpeed file without a scheduler", _no_schedule_in_file),),
    "learning_rate": (_in_file("lr"), _in_schedule("warmup_max_lr")),
    "weight_decay": (_in_file("weight_decay"),),
    "adam_beta1": (_ADAM, _in_file("betas")),
    "adam_beta2": (_ADAM, _in_file("betas")),
    "adam_epsilon": (_ADAM, _in_file("eps")),
    "optim": (Need("a DeepSpeed file without an optimizer", _no_optimizer_in_file),),
    "optim_args": (Need("a DeepSpeed file without an optimizer", _no_optimizer_in_file),),
    "gradient_checkpointing_kwargs": (_CHECKPOINTING,),
    "activation_checkpointing_kwargs": (_CHECKPOINTING,),
    "logging_steps": (Need("logging_strategy steps", _is("logging_strategy", "steps")),),
    "eval_steps": (Need("eval_strategy steps", _is("eval_strategy", "steps")),),
    "eval_delay": (Need("eval_strategy steps or epoch", _is_not("eval_strategy", "no")),),
    "save_steps": (Need("save_strategy steps", _is("save_strategy", "steps")),),
    "save_total_limit": (_CHECKPOINTS,),
    "save_on_each_node": (_CHECKPOINTS,),
    "metric_for_best_model": (_BEST,),
    "greater_is_better": (_BEST,),
    "length_column_name": (
        Need("train_sampling_strategy group_by_length", _is("train_sampling_strategy", "group_by_length")),
    ),
    "data_seed": (Need("a train_sampling_strategy that draws", _is_not("train_sampling_strategy", "sequential")),),
    "dataloader_in_order": (Need("dataloader_num_workers", lambda arguments: arguments.dataloader_num_workers > 0),),
    "run_name": (Need("report_to", _reports()),),
    "project": (_TRACKIO,),
    "trackio_space_id": (_TRACKIO,),
    "trackio_bucket_id": (_TRACKIO,),
    "trackio_static_space_id": (_TRACKIO,),
    "ignore_data_skip": (_RESUMED,),
    "restore_callback_states_from_checkpoint": (_RESUMED,),
}


def unmet_needs(arguments: TrainingArguments, names: Collection[str], keeps_best: bool) -> dict[str, str]:
    """Return name -> what it needs, for those of names that have no effect as the others are set.

    Args:
        arguments: of the run.
        names: of fields that were given.
        keeps_best: whether --load_best_model_at_end or --early_stopping_patience is given.
    """
    found = {}
    for name in names:
        needs = () if keeps_best and NEEDS.get(name) == (_BEST,) else NEEDS.get(name, ())
        unmet = [need.text for need in needs if not need.is_met(arguments)]
        if unmet:
            found[name] = " and ".join(unmet)
    return found


def _plain(value: Any) -> str:
    return str(getattr(value, "value", value))
