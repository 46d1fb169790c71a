"""A run is resumed only with every setting that decides its results, field by field of every group of flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from piece_ds.config.settings import parse
from piece_ds.preflight.best_step import DECISIVE as OF_BEST_STEP
from piece_ds.preflight.preflight import DECISIVE
from piece_ds.runtime.errors import UserError
from piece_ds.training.claim import Claim
from piece_ds.training.run_folder import RunFolder

# Written down a second time: what a person may change between the halves of a run.
MAY_CHANGE = {
    "output_dir",
    "overwrite_output_dir",
    "statistics_save_steps",
    "save_full",
    "nonfinite",
    "delta_every",
    "delta_coding",
    "recipe",
} | {"tokenized_cache"}
# Fields of TrainingArguments without which a resumed run could end with other weights.
OF_TRAINING = {
    "learning_rate",
    "per_device_train_batch_size",
    "max_steps",
    "num_train_epochs",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "optim",
    "optim_args",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
}


def other(value: Any) -> Any:
    """Return a value of another content, as JSON has it."""
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def test_every_setting_but_those_that_decide_nothing_must_stay(tmp_path: Path) -> None:
    groups: dict[str, dict[str, Any]] = json.loads(json.dumps(parse([]).resolved()))
    groups["TrainingArguments"] = dict.fromkeys(DECISIVE, 1)
    Claim(RunFolder(tmp_path), groups).make()
    num_tried = 0
    for group, fields in groups.items():
        for name, value in fields.items():
            changed = {**groups, group: {**fields, name: other(value)}}
            claim = Claim(RunFolder(tmp_path), changed, resume=True)
            num_tried += 1
            if name in MAY_CHANGE:
                claim.check()
                continue
            with pytest.raises(UserError, match=rf"belongs to another run \(.*{name}"):
                claim.check()
    assert num_tried > 80

    # A folder of an older version may not know a setting: then it had what the setting's absence means.
    (name, *_) = (name for name, value in groups["MethodArguments"].items() if value not in (None, False, ""))
    older = {**groups, "MethodArguments": {key: v for key, v in groups["MethodArguments"].items() if key != name}}
    Claim(RunFolder(tmp_path / "older"), older).make()
    with pytest.raises(UserError, match=rf"belongs to another run \(MethodArguments\.{name} was None"):
        Claim(RunFolder(tmp_path / "older"), groups, resume=True).check()


def test_what_decides_the_weights_is_among_them() -> None:
    assert set(DECISIVE) >= OF_TRAINING
    # When evaluations decide with which weights a task ends: which steps are evaluated, and by what.
    assert set(OF_BEST_STEP) >= {
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "metric_for_best_model",
        "greater_is_better",
    }
