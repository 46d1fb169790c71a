"""Every field of transformers' TrainingArguments works, is refused in one line, or is said to have no effect."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from support import argument_sweep as sweep
from support.launches import CONFIGS, ROOT, one_process, tree
from torch.utils import file_baton
from transformers import TrainingArguments

from piece_ds.cli.run import train
from piece_ds.config.parser import training_arguments_of
from piece_ds.config.settings import load_settings
from piece_ds.data.tasks import Task
from piece_ds.preflight.idle_fields import NEEDS, unmet_needs
from piece_ds.preflight.loss_and_order import check_label_smoothing, check_lengths
from piece_ds.preflight.preflight import preflight
from piece_ds.preflight.trainer_arguments import check_own_evaluation
from piece_ds.preflight.training_fields import FIELDS, NO_EFFECT, REFUSED, WORKS
from piece_ds.runtime.errors import UserError
from piece_ds.training.optimizer_defaults import show_defaults
from piece_ds.training.task_begin import arguments_of
from piece_ds.zero.config_file import check_deepspeed_config
from piece_ds.zero.file_optimizer import compile_optimizer, file_optimizer, settle_optimizer

pytestmark = pytest.mark.heavy

_PLATEAU = ("--lr_scheduler_type=reduce_lr_on_plateau", "--eval_strategy=epoch", "--lr_scheduler_kwargs")
_GREEDY = ("--lr_scheduler_type=greedy", "--eval_strategy=epoch", "--lr_scheduler_kwargs")
_CHECKPOINTED = ("--gradient_checkpointing=true", "--gradient_checkpointing_kwargs")
_BEST = ("--load_best_model_at_end=true", "--eval_strategy=steps")
# Flags -> what the one line says. Kinds: schedules, optimizers, numbers out of range, what masks are not proven with.
REFUSALS: dict[tuple[str, ...], str] = {
    ("--lr_scheduler_type=cosine_with_min_lr",): "cosine_with_min_lr without --lr_scheduler_kwargs cannot be made",
    ("--lr_scheduler_type=cosine_warmup_with_min_lr",): "min_lr or min_lr_rate should be set",
    ("--lr_scheduler_type=warmup_stable_decay",): "num_decay_steps",
    ("--lr_scheduler_type=warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": "x"}'): "cannot be made",
    ("--lr_scheduler_type=polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1}'): "must be smaller than initial lr",
    ("--lr_scheduler_type=polynomial", "--lr_scheduler_kwargs", '{"power": "x"}'): "cannot be made",
    ("--lr_scheduler_type=linear", "--lr_scheduler_kwargs", '{"colour": 1}'): "colour",
    ("--lr_scheduler_type=cosine", "--lr_scheduler_kwargs", '{"num_cycles": "x"}'): "cannot be made for 2 steps",
    ("--lr_scheduler_type=reduce_lr_on_plateau",): "requires an eval strategy",
    ("--lr_scheduler_kwargs=[1]",): "expects a JSON object",
    ("--lr_scheduler_type=constant", "--lr_scheduler_kwargs", '{"a": 1}'): "constant takes no options",
    (
        "--lr_scheduler_type=cosine",
        "--lr_scheduler_kwargs",
        '{"num_cycles": NaN}',
    ): "num_cycles expects a finite",
    (*_PLATEAU, '{"patience": "x"}'): "cannot be made",
    (*_PLATEAU, '{"min_lr": "x"}'): "cannot be made",
    (*_PLATEAU, '{"cooldown": "x"}'): "cannot be made",
    (*_PLATEAU, '{"threshold": null}'): "cannot be made",
    (*_PLATEAU, '{"mode": "max"}'): "would take a better loss for a worse one",
    (*_PLATEAU, "{}", "--metric_for_best_model=score"): "would take a better score for a worse one",
    (*_GREEDY, '{"patience": "x"}'): "cannot be made",
    (*_GREEDY, '{"min_lr": "x"}'): "cannot be made",
    (*_GREEDY, '{"max_lr": "x"}'): "cannot be made",
    (*_GREEDY, '{"warmup": "x"}'): "cannot be made",
    (*_GREEDY, '{"mode": "max"}'): "would take a better loss for a worse one",
    (*_CHECKPOINTED, '{"colour": 1}'): "'colour' is unknown; known: use_reentrant",
    (*_CHECKPOINTED, '{"use_reentrant": "no"}'): "use_reentrant expects true or false, got 'no'",
    (*_CHECKPOINTED, '{"determinism_check": "x"}'): "determinism_check should be one of",
    (*_CHECKPOINTED, '{"every_n_layers": 0}'): "every_n_layers",
    (*_CHECKPOINTED, '{"every_n_layers": "x"}'): "every_n_layers",
    (*_CHECKPOINTED, '{"offload": true}'): "offload",
    (*_CHECKPOINTED, "[1]"): "expects a JSON object",
    (*_CHECKPOINTED, "5"): "expects a JSON object",
    ("--label_smoothing_factor=0.1", "--loss_chunk_tokens=4"): "--loss_chunk_tokens has no meaning with",
    ("--neftune_noise_alpha=1e300",): "--neftune_noise_alpha expects",
    ("--train_sampling_strategy=group_by_length", "--length_column_name=labels"): "does not hold whole numbers",
    ("--train_sampling_strategy=group_by_length", "--length_column_name=input_ids"): "does not hold whole numbers",
    ('--accelerator_config={"use_seedable_sampler": "no"}',): "expects true or false, got 'no'",
    ("--optim=adagrad", "--method=seqft"): "--optim adagrad ends in DeepSpeed's partitioning",
    ("--optim=sgd",): "--optim sgd: a zero gradient may move a weight",
    ("--optim_args=beta=1",): "takes no options from there",
    ("--optim=sgd", "--method=seqft", "--optim_args=colour=1"): "colour=1 changes nothing of --optim sgd",
    ("--optim=adafactor", "--method=seqft", "--optim_args=beta1=0.5"): "changes nothing of --optim adafactor",
    ("--optim=rmsprop", "--method=seqft", "--optim_args=alpha=0.5,weight_decay=1"): "weight_decay=1 changes nothing",
    ("--bf16_full_eval=true",): "it would train in bf16 too: give --bf16",
    ("--fp16_full_eval=true",): "it would train in fp16 too: give --fp16",
    ("--adam_beta1=1",): "--adam_beta1 expects a finite number of at least 0 and below 1, got 1.0",
    ("--adam_beta2=1",): "--adam_beta2 expects",
    ("--adam_epsilon=0",): "--adam_epsilon expects a finite number above 0",
    ("--learning_rate=nan",): "--learning_rate expects",
    ("--weight_decay=-1",): "--weight_decay expects",
    ("--max_grad_norm=-1",): "--max_grad_norm expects",
    ("--gradient_accumulation_steps=0",): "--gradient_accumulation_steps expects a finite number of at least 1",
    ("--per_device_train_batch_size=0",): "--per_device_train_batch_size expects",
    ("--per_device_eval_batch_size=-1",): "--per_device_eval_batch_size expects",
    ("--max_steps=0",): "--max_steps expects",
    ("--num_train_epochs=inf", "--max_steps=-1"): "--num_train_epochs expects",
    ("--logging_steps=inf",): "--logging_steps",
    ("--save_total_limit=0",): "--save_total_limit expects",
    ("--seed=-1",): "--seed expects a finite number of at least 0",
    (f"--seed={2**64}",): "--seed expects",
    ("--seed=" + "9" * 5000,): "--seed",
    ("--data_seed=-7",): "--data_seed expects",
    ("--dataloader_num_workers=-3",): "--dataloader_num_workers expects",
    ("--dataloader_prefetch_factor=2",): "--dataloader_num_workers > 0",
    ("--dataloader_multiprocessing_context=thread", "--dataloader_num_workers=1"): "invalid choice: 'thread'",
    ("--hub_model_id=me/model",): "--hub_model_id belongs to --push_to_hub",
    ("--hub_private_repo=true",): "--hub_private_repo belongs to --push_to_hub",
    ("--load_best_model_at_end=true",): "--load_best_model_at_end needs evaluations",
    ("--early_stopping_patience=2",): "--early_stopping_patience needs evaluations",
    ("--early_stopping_patience=0", "--eval_strategy=epoch"): "--early_stopping_patience must be positive",
    ("--early_stopping_threshold=1", "--eval_strategy=epoch"): "belongs to --early_stopping_patience",
    ("--early_stopping_threshold=nan", "--early_stopping_patience=1", "--eval_strategy=epoch"): "must be 0 or more",
    (*_BEST, "--metric_for_best_model=loss_within_budget"): "needs --forgetting_budget",
    (*_BEST, "--metric_for_best_model=score", "--scorers=train=loss"): "task train has no score",
    (*_BEST, "--method=lora"): "this method does not resume",
    (*_BEST, "--method=seqft"): "--save_strategy best",
    (*_BEST, "--method=seqft", "--save_steps=2", "--eval_steps=1"): "--save_strategy best",
    (*_BEST, "--eval_file="): "has none: give --eval_file",
    ("--save_only_model=true",): "cannot be resumed from",
    ("--save_only_model=true", "--resume_from_checkpoint=true"): "cannot be resumed from",
    ("--auto_find_batch_size=true",): "--per_device_train_batch_size",
    ("--fsdp=full_shard",): "use --deepspeed zero3",
    ("--torch_compile=true",): "not proven",
    ("--use_liger_kernel=true",): "not proven",
    ("--enable_jit_checkpoint=true",): "SIGTERM",
    ("--debug=underflow_overflow",): "--nonfinite",
    ('--accelerator_config={"colour": 1}',): "--accelerator_config={",
    ("--accelerator_config=nofile.json",): "nofile.json",
    ('--accelerator_config={"split_batches": true}',): "split_batches",
    ('--accelerator_config={"even_batches": false}',): "even_batches",
    ("--dataloader_drop_last=true", "--eval_strategy=epoch"): "would leave no batch of task train: 4 rows",
    ("--dataloader_drop_last=true", "--per_device_train_batch_size=17"): "would leave no batch of task train: 16 rows",
    ("--save_strategy=best", "--eval_strategy=epoch", "--metric_for_best_model=accuracy"): "use loss",
    ("--overwrite_output_dir=true", "--resume_from_checkpoint=true"): "exclude each other",
    ("--eval_on_start=true",): "--eval_on_start needs --eval_strategy",
    ("--save_strategy=best", "--eval_strategy=epoch"): "--metric_for_best_model loss",
    ("--save_strategy=best", "--metric_for_best_model=loss"): "--eval_strategy",
    ("--ddp_timeout=inf",): "--ddp_timeout expects seconds",
    ("--ddp_timeout=1e300",): "--ddp_timeout expects seconds",
    ("--deepspeed={}",): "holds no setting",
    ("--deepspeed=" + "9" * 5000,): "no such file",
}

# Flags that mean something together, all at once in one run.
TOGETHER = {
    "lr_scheduler_type": "warmup_stable_decay",
    "lr_scheduler_kwargs": json.dumps({"num_decay_steps": 1}),
    "warmup_steps": "0.5",
    "gradient_accumulation_steps": "2",
    "label_smoothing_factor": "0.1",
    "neftune_noise_alpha": "5",
    "max_grad_norm": "0.5",
    "weight_decay": "0.1",
    "adam_beta1": "0.8",
    "gradient_checkpointing": "True",
    "gradient_checkpointing_kwargs": json.dumps({"use_reentrant": False}),
    "include_num_input_tokens_seen": "True",
    "eval_strategy": "steps",
    "eval_steps": "1",
    "eval_delay": "1",
    "eval_on_start": "True",
    "eval_accumulation_steps": "1",
    "per_device_eval_batch_size": "2",
    "save_strategy": "steps",
    "save_steps": "1",
    "save_total_limit": "1",
    "metric_for_best_model": "loss",
    "train_sampling_strategy": "group_by_length",
    "dataloader_drop_last": "True",
    "data_seed": "3",
    "seed": "007",
    "logging_first_step": "True",
    "accelerator_config": json.dumps({"non_blocking": True}),
    "use_cache": "False",
    "skip_memory_metrics": "False",
    "torch_empty_cache_steps": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with one_process():
        made = tmp_path_factory.mktemp("arguments")
        sweep.make_inputs(made)
        yield made


def test_the_table_names_every_field_of_the_installed_transformers() -> None:
    assert set(FIELDS) >= {field.name for field in fields(TrainingArguments) if field.init}
    assert {treatment.kind for treatment in FIELDS.values()} == {WORKS, REFUSED, NO_EFFECT}
    assert all(treatment.note for treatment in FIELDS.values() if treatment.kind != WORKS)


def test_the_page_is_the_table() -> None:
    page = (ROOT / "docs" / "training-arguments.md").read_text(encoding="utf-8")
    assert page == sweep.table(), "run PYTHONPATH=.:tests python -m support.argument_sweep --table"


def test_what_cannot_work_is_refused_in_one_line_and_nothing_is_written(folder: Path) -> None:
    for flags, message in REFUSALS.items():
        found, said = sweep.outcome([*sweep.base_flags(folder), *flags], folder / "out", trains=False)
        assert found == "refused", (flags[0][:80], found, said)
        assert message in said, (flags[0][:80], said)
        assert len(said) < 1000, flags[0][:80]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_values_of_any_field_end_in_no_traceback(every: int) -> None:
    """TrainingArguments alone; the sweep takes them through preflight(). Every field meets some, each value many."""
    refused = []
    cases = [flags for _, flags in sweep.cases([])]
    for flags in cases[::every]:
        try:
            training_arguments_of(["--use_cpu", "True", "--report_to", "none", *flags])
        except UserError as error:
            refused.append(str(error))
    assert len(cases) > 1500
    assert max(map(len, refused)) < 1000


def test_what_has_no_effect_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = ["--do_train=True", "--hub_always_push=True", "--ddp_backend=gloo", "--run_name=x"]
    with caplog.at_level(logging.WARNING):
        preflight(load_settings([*sweep.base_flags(folder), *given]))
    (line,) = [record.getMessage() for record in caplog.records if "without effect" in record.getMessage()]
    assert all(f"--{name}" in line for name in ("do_train", "hub_always_push", "ddp_backend"))
    assert "run_name (needs report_to)" in line


def test_every_need_is_one_of_a_field_that_works_and_is_said_if_it_is_unmet(folder: Path) -> None:
    assert {FIELDS[name].kind for name in NEEDS} == {WORKS}
    flags = ["--eval_steps=1", "--data_seed=1", "--train_sampling_strategy=sequential", "--metric_for_best_model=loss"]
    flags += ["--lr_scheduler_type=constant", "--warmup_steps=1", "--gradient_checkpointing_kwargs={}"]
    settings = load_settings([*sweep.base_flags(folder), *flags])
    arguments = settings.training_arguments()
    expected = {"eval_steps", "data_seed", "warmup_steps", "metric_for_best_model", "gradient_checkpointing_kwargs"}
    assert set(unmet_needs(arguments, settings.given, keeps_best=False)) == expected
    assert set(unmet_needs(arguments, settings.given, keeps_best=True)) == expected - {"metric_for_best_model"}


def test_numbers_in_the_deepspeed_file_that_contradict_flags_are_refused_before_the_model(folder: Path) -> None:
    for content, message in (
        ({"train_micro_batch_size_per_gpu": 7}, "train_micro_batch_size_per_gpu=7"),
        ({"gradient_accumulation_steps": 3}, "gradient_accumulation_steps=3"),
        ({"gradient_clipping": 9.0}, "gradient_clipping=9.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True"),
    ):
        path = folder / "ds.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **content}))
        found, said = sweep.outcome([*sweep.base_flags(folder), "--deepspeed", str(path)], folder / "out", trains=False)
        assert (found, message in said) == ("refused", True), said


# Content of a DeepSpeed file, besides batch and stage -> what the one line says.
_STAGE = {"stage": 1}
_OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
FILES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu"),
    ({"zero_optimization": {"stage": None}}, "stage: Input should be"),
    ({"zero_optimization": {**_STAGE, "colour": 3}}, "colour: Extra inputs are not permitted"),
    (
        {"zero_optimization": {**_STAGE, "cpu_offload": True}},
        "use offload_optimizer.device 'cpu': DeepSpeed has renamed",
    ),
    ({"zero_optimization": {**_STAGE, "cpu_offload_params": True}}, "use offload_param.device"),
    ({"zero_optimization": {**_STAGE, "legacy_stage1": True}}, "DeepSpeed has removed it"),
    ({"zero_optimization": {**_STAGE, "reduce_bucket_size": "x"}}, "reduce_bucket_size: Input should be"),
    ({"zero_optimization": {**_STAGE, "reduce_bucket_size": -1}}, "reduce_bucket_size: Input should be"),
    ({"communication_data_type": "colour"}, "Invalid communication_data_type"),
    ({"checkpoint": {"tag_validation": "colour"}}, "tag_validation"),
    ({"seq_parallel_communication_data_type": 3}, "refuses the configuration"),
    ({"optimizer": {"type": "Colour"}}, "optimizer Colour: a zero gradient may move a weight"),
    ({"optimizer": {"type": "Lion"}}, "optimizer Lion: a zero gradient may move a weight"),
    ({"optimizer": {"params": {}}}, "optimizer expects an object with a type"),
    ({"optimizer": {"type": "AdamW", "params": {"colour": 1}}}, "optimizer AdamW with {'colour': 1} cannot be made"),
    ({"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, "has no bias_correction: remove it"),
    ({"scheduler": {"type": "WarmupLR"}}, 'add "params": {}'),
    ({**_OFFLOAD, "zero_force_ds_cpu_optimizer": True}, "replaced by DeepSpeedCPUAdam"),
    ({"scheduler": {"type": "Colour"}}, "scheduler Colour is unknown"),
    ({"scheduler": {"type": "WarmupLR", "params": {"colour": 1}}}, "scheduler WarmupLR with"),
    ({"scheduler": "WarmupLR"}, "scheduler"),
    ({"tensorboard": {"enabled": True}}, "use --report_to"),
    ({"csv_monitor": {"enabled": True}}, "use --report_to"),
    ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation false; remove it"),
    ({"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype 'fp8' is none of fp32, bf16, fp16"),
)


def test_what_deepspeed_would_refuse_of_its_file_is_refused_before_the_model(folder: Path) -> None:
    for content, message in FILES:
        whole = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": _STAGE, **content}
        text = json.dumps({key: value for key, value in whole.items() if value is not None})
        found, said = sweep.outcome([*sweep.base_flags(folder), "--deepspeed", text], folder / "out", trains=False)
        assert (found, message in said) == ("refused", True), (content, found, said)
    whole = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": _STAGE}
    for key in ("gradient_clipping", "wall_clock_breakdown", "dump_state"):
        command = [*sweep.base_flags(folder), "--deepspeed", json.dumps({**whole, key: None})]
        found, said = sweep.outcome(command, folder / "out", trains=False)
        assert (found, f"{key} is null" in said) == ("refused", True), (key, found, said)
    for optimizer, message in (
        ("SGD", "zero_allow_untested_optimizer"),
        ("Lion", "use --optim instead"),
        ("sgd", "use --optim instead"),
        ("Adagrad", "AdamW"),
    ):
        allowed = {"zero_allow_untested_optimizer": True} if optimizer == "Adagrad" else {}
        text = json.dumps({**whole, **allowed, "optimizer": {"type": optimizer}})
        command = [*sweep.base_flags(folder), "--method", "seqft", "--deepspeed", text]
        found, said = sweep.outcome(command, folder / "out", trains=False)
        assert (found, message in said) == ("refused", True), (optimizer, found, said)


def test_options_that_the_optimizer_of_an_accelerator_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piece_ds.zero.file_optimizer._has_accelerator", lambda: True)
    for more, options, said in (
        ({}, {"amsgrad": True}, "DeepSpeed's FusedAdam here, which does not know 'amsgrad'"),
        ({}, {"fused": True}, "does not know 'fused'"),
        (_OFFLOAD, {"amsgrad": True}, "DeepSpeed's DeepSpeedCPUAdam here, which does not know 'amsgrad'"),
        (_OFFLOAD, {"foreach": True}, "does not know 'foreach'"),
        (_OFFLOAD, {"torch_adam": True, "bias_correction": False}, "has no bias_correction"),
    ):
        content = {**more, "optimizer": {"type": "AdamW", "params": options}}
        assert settle_optimizer(content) == []
        with pytest.raises(UserError, match=said):
            file_optimizer(content, masked=True)

    # Its own kernels, which cannot be compiled here.
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("deepspeed.ops.op_builder.builder.OpBuilder.load", fail)
    for more, name in (({}, "fused_adam"), (_OFFLOAD, "cpu_adam")):
        with pytest.raises(UserError, match=f"needs DeepSpeed's {name}, which cannot be compiled here"):
            compile_optimizer({**more, "optimizer": {"type": "AdamW"}})


def test_a_lock_that_a_killed_compilation_left_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*args: Any) -> None:
        raise AssertionError("torch's own wait, which has no limit")

    monkeypatch.setattr(file_baton.FileBaton, "wait", wait)  # restored afterwards
    (tmp_path / "lock").touch()
    os.utime(tmp_path / "lock", (0, 0))

    def load(*args: Any, **kwargs: Any) -> None:
        file_baton.FileBaton(str(tmp_path / "lock")).wait()

    monkeypatch.setattr("deepspeed.ops.op_builder.builder.OpBuilder.load", load)
    with pytest.raises(UserError, match=r"^\S+/lock is held by no process.*remove it, then start again$"):
        compile_optimizer({"optimizer": {"type": "AdamW"}})


def test_decay_that_reaches_other_weights_is_refused_of_a_mask() -> None:
    section = {"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.5}}
    with pytest.raises(UserError, match=r"adds weight decay 0\.5 to the gradient"):
        file_optimizer({"optimizer": section}, masked=True)
    file_optimizer({"optimizer": section}, masked=False)
    file_optimizer({"optimizer": {"type": "Adam", "params": {"weight_decay": 0.5}}}, masked=True)


def test_the_optimizer_is_the_one_that_flags_and_file_ask_for(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Accelerate would replace it by one with other betas, and DeepSpeed would compile its own for minutes."""
    auto = {"train_micro_batch_size_per_gpu": "auto"}
    adam = {"type": "AdamW", "params": {"lr": "auto", "set_grad_none": True}}
    for content, key, expected, said in (
        ({**auto, **_OFFLOAD}, "zero_force_ds_cpu_optimizer", False, "is that of --optim"),
        (
            {**auto, "zero_optimization": _STAGE, "optimizer": adam},
            "optimizer",
            {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "optimizer AdamW is torch's here",
        ),
    ):
        flags = [*sweep.base_flags(folder), "--learning_rate", "1e-3", "--deepspeed", json.dumps(content)]
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            preflight(load_settings(flags))
        assert said in caplog.text
        arguments = arguments_of(load_settings(flags), folder / "out", masked=True)
        assert arguments.deepspeed_plugin.deepspeed_config is arguments.hf_deepspeed_config.config
        assert arguments.hf_deepspeed_config.config[key] == expected
        assert settle_optimizer(arguments.hf_deepspeed_config.config) == []


def test_flags_that_the_optimizer_does_not_take_are_said(folder: Path) -> None:
    def file(**content: Any) -> list[str]:
        return ["--deepspeed", json.dumps({"zero_optimization": _STAGE, **content})]

    names = ["learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"]
    for flags, expected in (
        (["--optim=sgd", "--method=seqft"], names[2:]),
        (["--optim=adafactor", "--method=seqft"], names[2:]),
        (["--optim=adamw_torch"], []),
        (file(optimizer={"type": "AdamW"}), names),
        (file(optimizer={"type": "AdamW", "params": {"lr": "auto"}}), names[1:]),
        (file(scheduler={"type": "OneCycle", "params": {}}), names[:1]),
        (file(scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}), []),
    ):
        arguments = load_settings([*sweep.base_flags(folder), *flags]).training_arguments()
        assert set(unmet_needs(arguments, names, keeps_best=False)) == set(expected), flags


def test_a_dropped_last_batch_is_one_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piece_ds.preflight.trainer_arguments.world_size", lambda: 2)
    arguments: Any = SimpleNamespace(
        dataloader_drop_last=True,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        eval_strategy="no",
        eval_on_start=False,
    )
    check_own_evaluation(arguments, {"a": 8}, {"a": 5})  # nothing is evaluated
    with pytest.raises(UserError, match="no batch of task b: 7 rows are fewer than 4 on each of 2 ranks"):
        check_own_evaluation(arguments, {"a": 8, "b": 7}, {"a": 6, "b": 6})
    arguments.eval_strategy = "steps"
    check_own_evaluation(arguments, {"a": 8}, {"a": 6})
    with pytest.raises(UserError, match="no batch of task a: 5 rows are fewer than 3 on each of 2 ranks"):
        check_own_evaluation(arguments, {"a": 8}, {"a": 5})
    arguments.dataloader_drop_last = False
    check_own_evaluation(arguments, {"a": 1}, {"a": 1})
    with pytest.raises(UserError, match="task b has no eval rows"):
        check_own_evaluation(arguments, {"a": 1, "b": 1}, {"a": 1, "b": 0})


def test_keys_that_deepspeed_does_not_know_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": _STAGE, "gradient_clippings": 1.0}
    with caplog.at_level(logging.WARNING):
        preflight(load_settings([*sweep.base_flags(folder), "--deepspeed", json.dumps(content)]))
    assert "does not know 'gradient_clippings' and ignores it. Did you mean 'gradient_clipping'?" in caplog.text
    for path in CONFIGS.glob("*.json"):
        caplog.clear()
        check_deepspeed_config({**json.loads(path.read_text()), **_NUMBERS}, masked=True)
        assert not caplog.records, path


# In place of "auto".
_NUMBERS = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "train_batch_size": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": False},
    "fp16": {"enabled": False},
    "zero_optimization": {"stage": 1},
}


def test_smoothing_and_order_by_length_are_refused_where_transformers_would_do_something_else() -> None:
    settings, rows = load_settings(["--train_file", "x"]), datasets.Dataset.from_dict({"input_ids": [[1]], "n": [1]})
    smoothed, task = SimpleNamespace(label_smoothing_factor=0.1), Task("a", rows, rows, rows, [], [])
    with pytest.raises(UserError, match="does not list Linear as a causal model"):
        check_label_smoothing(settings, smoothed, lambda: torch.nn.Linear(1, 1))
    check_label_smoothing(settings, smoothed, lambda: type("LlamaForCausalLM", (torch.nn.Module,), {})())
    for names, column, refused in (
        (["pixel_values", "input_ids"], "length", True),
        (["pixel_values"], "n", False),
        (["input_ids"], "length", False),
        (["input_ids"], "input_ids", True),
    ):
        arguments = SimpleNamespace(train_sampling_strategy="group_by_length", length_column_name=column)
        with pytest.raises(UserError, match="leave it out") if refused else nullcontext():
            check_lengths(arguments, [task], SimpleNamespace(model_input_names=names))


def test_importance_is_taken_without_the_noise_of_neftune(folder: Path) -> None:
    masks = []
    for alpha in ("0", "50"):
        flags = ["--method=piece-s", f"--neftune_noise_alpha={alpha}", "--max_steps=1", "--save_model=never"]
        _, run = train(load_settings([*sweep.base_flags(folder), *flags, "--output_dir", str(folder / alpha)]))
        masks.append((run.root / "00-train" / "mask.safetensors").read_bytes())
    assert masks[0] == masks[1]


@pytest.mark.slow
def test_fields_that_work_train_together(folder: Path) -> None:
    flags = [item for name, value in TOGETHER.items() for item in (f"--{name}", value)]
    results, run = train(load_settings([*sweep.base_flags(folder), *flags, "--output_dir", str(folder / "together")]))
    assert results.cost["train"]["num_steps"] == 2
    written = tree(run.root)
    assert any(name.endswith("delta.safetensors") for name in written), written


@pytest.mark.slow
def test_schedules_that_read_the_optimizers_defaults_train_in_deepspeed(folder: Path) -> None:
    """DeepSpeed's wrapper has none, and they would end in AttributeError once the engine is made."""
    for stage, flags in (
        ("zero1", ["--lr_scheduler_type=polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1e-9}']),
        ("zero3", ["--lr_scheduler_type=cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}']),
        ("zero0", ["--lr_scheduler_type=cosine_warmup_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}']),
    ):
        found = sweep.outcome([*sweep.base_flags(folder), *flags, "--deepspeed", stage], folder / "out", trains=True)
        assert found == ("passed", ""), flags


def test_defaults_are_shown_through_wrappers() -> None:
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    wrapper = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))
    show_defaults(wrapper)
    assert wrapper.optimizer.defaults["lr"] == wrapper.defaults["lr"] == 0.5
    show_defaults(SimpleNamespace(optimizer=None))


def test_a_precision_that_the_device_lacks_is_refused_before_the_model(folder: Path) -> None:
    if get_accelerator().is_fp16_supported():
        pytest.skip("this device trains in fp16")
    found, said = sweep.outcome([*sweep.base_flags(folder), "--fp16", "True"], folder / "out", trains=False)
    assert (found, "--fp16: DeepSpeed does not train in fp16" in said) == ("refused", True), said
