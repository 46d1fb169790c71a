"""Every field of transformers' TrainingArguments with ordinary and hostile values, in one process, on a tiny model.

`PYTHONPATH=.:tests python -m support.argument_sweep [--train] [FIELD ...]` prints one JSON row for each value: what
came of it. With --train, values that preflight() lets through are trained with, two steps each. `--table` writes
docs/training-arguments.md.
"""

import json
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from piece_ds.cli.run import train
from piece_ds.config.settings import load_settings
from piece_ds.preflight.idle_fields import NEEDS
from piece_ds.preflight.preflight import preflight
from piece_ds.preflight.training_fields import FIELDS, Treatment
from piece_ds.runtime.errors import MachineError, UserError
from piece_ds.runtime.process import one_process_environment
from support.launches import CONFIGS, ROOT, make_model_folder, make_rows, write_rows

# Tried on every field, whatever its type.
HOSTILE = ("", "-1", "0", "1", "nan", "inf", "1e400", "9" * 5000, str(2**63), "true", "no", "{}", "[]", "nonsense", "é")

_AUTO = {"train_micro_batch_size_per_gpu": "auto"}

# Tried on a field besides: what it takes, and what it nearly takes. Tuples are several flags.
VALUES: dict[str, tuple[str | tuple[str, ...], ...]] = {
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
        "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
        ("cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6}'),
        ("cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-6, "min_lr_rate": 0.1}'),
        ("cosine_warmup_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr_rate": 0.1}'),
        ("warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": 1}'),
        ("warmup_stable_decay", "--lr_scheduler_kwargs", '{"num_decay_steps": "many"}'),
        ("polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1}'),
        ("polynomial", "--lr_scheduler_kwargs", '{"lr_end": 1e-9}'),
        ("linear", "--lr_scheduler_kwargs", '{"colour": 1}'),
        ("cosine", "--lr_scheduler_kwargs", '{"num_cycles": "x"}'),
        ("reduce_lr_on_plateau", "--eval_strategy", "epoch"),
        *(
            ("reduce_lr_on_plateau", "--eval_strategy", "epoch", "--lr_scheduler_kwargs", options)
            for options in ('{"patience": "x"}', '{"min_lr": "x"}', '{"cooldown": "x"}', '{"threshold": null}')
        ),
        ("constant", "--lr_scheduler_kwargs", '{"a": 1}'),
        ("constant_with_warmup", "--lr_scheduler_kwargs", '{"num_cycles": 1}'),
        ("cosine", "--lr_scheduler_kwargs", '{"num_cycles": NaN}'),
        ("inverse_sqrt", "--lr_scheduler_kwargs", '{"timescale": 0}'),
    ),
    "lr_scheduler_kwargs": ('{"min_lr": 1}', "[1]", "{'a': 1}", "null"),
    "warmup_steps": ("0.5", "2", "1000"),
    "optim": (
        "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_anyprecision", "sgd", "adafactor",
        "adamw_apex_fused", "lomo", "galore_adamw", "muon",
        *((name, "--method", "seqft") for name in ("adagrad", "rmsprop", "sgd", "adafactor", "lion_8bit")),
    ),
    "optim_args": ("beta=1", "weights", "a=b,c", "lr=1"),
    "adam_beta1": ("0.5", "0.999999"),
    "adam_epsilon": ("1e-12",),
    "gradient_accumulation_steps": ("2", "4"),
    "label_smoothing_factor": ("0.1", "2", ("0.1", "--loss_chunk_tokens", "4")),
    "gradient_checkpointing_kwargs": (
        '{"use_reentrant": false}', '{"use_reentrant": true}', '{"colour": 1}',
        *((value, "--gradient_checkpointing", "true") for value in (
            '{"use_reentrant": false}', '{"use_reentrant": true}', '{"colour": 1}', '{"use_reentrant": "no"}', "[1]",
            '{"determinism_check": "none"}', '{"determinism_check": "x"}', '{"every_n_layers": 0}',
            '{"every_n_layers": "x"}', '{"every_n_layers": 2}', '{"offload": true}', '{"preserve_rng_state": false}',
        )),
    ),
    "activation_checkpointing_kwargs": (
        '{"use_reentrant": false}', '{"colour": 1}', ('{"colour": 1}', "--activation_checkpointing", "true"),
    ),
    "logging_strategy": ("steps", "epoch", "no"),
    "logging_steps": ("0.5", "2"),
    "eval_strategy": ("steps", "epoch", "no", "best"),
    "eval_steps": ("1", "0.5", ("1", "--eval_strategy", "steps"), ("0", "--eval_strategy", "steps")),
    "save_strategy": ("steps", "epoch", "no", "best", ("best", "--metric_for_best_model", "loss")),
    "save_steps": ("2", "0.5"),
    "save_total_limit": ("1", "2"),
    "report_to": ("none", "tensorboard", "mlflow", "wandb", "all", "trackio"),
    "log_level": ("debug", "info", "warning"),
    "log_level_replica": ("debug",),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "debug": ("underflow_overflow", "tpu_metrics_debug"),
    "fsdp": ("full_shard", "offload"),
    "fsdp_config": ('{"version": 2}', "nofile.json"),
    "accelerator_config": (
        '{"split_batches": true}', '{"dispatch_batches": true}', '{"colour": 1}', '{"use_seedable_sampler": false}',
        '{"gradient_accumulation_kwargs": {"num_steps": 3}}', '{"use_seedable_sampler": "no"}',
        "nofile.json", '{"even_batches": false}',
    ),
    "dataloader_num_workers": ("2", "-3"),
    "dataloader_prefetch_factor": ("2", ("2", "--dataloader_num_workers", "1")),
    "dataloader_multiprocessing_context": ("fork", ("fork", "--dataloader_num_workers", "1")),
    "dataloader_persistent_workers": (("true", "--dataloader_num_workers", "1"),),
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "length_column_name": (("labels", "--train_sampling_strategy", "group_by_length"),),
    "load_best_model_at_end": (
        ("true", "--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "1", "--save_steps", "1"),
    ),
    "metric_for_best_model": ("loss", "accuracy"),
    "hub_strategy": ("end", "every_save", "checkpoint"),
    "ddp_backend": ("gloo", "nccl"),
    "ddp_timeout": ("60",),
    "deepspeed": (
        "zero0", "zero1", "zero2", "zero3", "nofile.json",
        *(json.dumps(content) for content in (
            {"zero_optimization": {"stage": 1}}, {"zero_optimization": {"stage": None}, **_AUTO},
            {"zero_optimization": {"stage": 1, "colour": 3}, **_AUTO}, {"zero_optimisation": {"stage": 1}, **_AUTO},
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}, **_AUTO},
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW"}, **_AUTO},
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lion"}, **_AUTO},
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"colour": 1}}, **_AUTO},
            {"zero_optimization": {"stage": 1}, "scheduler": {"type": "Colour"}, **_AUTO},
            {"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR", "params": {"x": 1}}, **_AUTO},
            {"zero_optimization": {"stage": 1}, "tensorboard": {"enabled": True}, **_AUTO},
            {"zero_optimization": {"stage": 1}, "checkpoint": {"tag_validation": "colour"}, **_AUTO},
        )),
    ),
    "save_only_model": (("true", "--save_strategy", "steps"), ("true", "--resume_from_checkpoint", "true")),
    "eval_use_gather_object": (("true", "--eval_strategy", "epoch"),),
    "prediction_loss_only": (("true", "--eval_strategy", "epoch"),),
    "batch_eval_metrics": (("true", "--eval_strategy", "epoch"),),
    "include_for_metrics": ("loss", ("loss", "--eval_strategy", "epoch")),
    "eval_accumulation_steps": (("1", "--eval_strategy", "epoch"),),
    "torch_compile_mode": ("default",),
    "torch_compile_backend": ("eager",),
    "optim_target_modules": ("all-linear", ".*attn.*"),
    "seed": (str(2**32 - 1), str(2**32), "-5", "007"),
    "data_seed": ("3",),
    "neftune_noise_alpha": ("5", "1e300"),
    "torch_empty_cache_steps": ("2",),
    "label_names": ("labels",),
    "liger_kernel_config": ('{"rope": true}',),
    "parallelism_config": ('{"dp_size": 1}',),
}  # fmt: skip


def cases(names: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Fields of the installed transformers (those in names, if any) with each value, as flags."""
    for field in fields(TrainingArguments):
        if not field.init or field.name == "output_dir" or (names and field.name not in names):
            continue
        for value in dict.fromkeys((*VALUES.get(field.name, ()), *HOSTILE)):
            several = (value,) if isinstance(value, str) else value
            yield field.name, (f"--{field.name}={several[0]}", *several[1:])


def base_flags(folder: Path) -> list[str]:
    """A run that is good but for what is added."""
    return [
        *("--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "train.jsonl")),
        *("--eval_file", str(folder / "eval.jsonl"), "--deepspeed", str(CONFIGS / "zero1.json"), "--use_cpu", "True"),
        *("--output_dir", str(folder / "out"), "--max_steps", "2", "--per_device_train_batch_size", "4"),
        *("--logging_steps", "1", "--method", "magnitude", "--mask_ratio", "0.05", "--disable_tqdm", "True"),
    ]


def make_inputs(folder: Path) -> None:
    """Write the model and the rows of base_flags()."""
    make_model_folder(folder / "model")
    write_rows(folder / "train.jsonl", make_rows(0, 16, ("A", "B")))
    write_rows(folder / "eval.jsonl", make_rows(1, 4, ("A", "B")))


def outcome(argv: list[str], out: Path, trains: bool) -> tuple[str, str]:
    """What comes of a command line: ('passed' | 'refused' | 'traceback' | 'wrote', its message)."""
    shutil.rmtree(out, ignore_errors=True)
    try:
        settings = load_settings(argv)
        if trains:
            train(settings)
        else:
            preflight(settings)
    except (UserError, MachineError) as error:
        return ("wrote" if out.exists() else "refused"), " ".join(str(error).split())[:300]
    except Exception as error:  # a defect, to be shown
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"[:300]
    return "passed", ""


_INTRODUCTION = (
    "Each field of transformers' `TrainingArguments` is a flag and a YAML key of `piece_ds train`, `select` and",
    "`evaluate`. In a `Trainer` of your own with `PieceCallback` the fields are transformers' own, and only what",
    "DeepSpeed's engine tells is refused: leave out what this page refuses. A field *works* as transformers says;",
    "it is *refused*, in one line and before anything is written, where it contradicts masks or checkpoints; or it has",
    "*no effect* here, which the run says if it is given, as it says of a field whose *needs* are not met. Numbers out",
    "of range are refused too, and so are schedules and optimizers that cannot be made.",
    "`PYTHONPATH=.:tests python -m support.argument_sweep --table` makes this page, and",
    "`unit/test_training_arguments.py` holds it to the installed transformers.",
)


def table() -> str:
    """docs/training-arguments.md, from piece_ds.preflight.training_fields and the installed transformers."""
    lines = [
        "# TrainingArguments, field by field",
        "",
        *_INTRODUCTION,
        "",
        "| flag | here | to know |",
        "|---|---|---|",
    ]
    for field in fields(TrainingArguments):
        treatment = FIELDS[field.name]
        note = (treatment.note[:1].upper() + treatment.note[1:]).replace("|", "\\|")
        needs = [f"needs {need.text}" for need in NEEDS.get(field.name, ())]
        note = "; ".join(filter(None, [note, *needs]))
        lines.append(f"| `{field.name}` | {treatment.kind} | {' '.join(filter(None, (note, _range(treatment))))} |")
    return "\n".join(lines) + "\n"


def _range(treatment: Treatment) -> str:
    expected = treatment.range_error(float("nan"))
    plain = (expected or "").removeprefix("a finite number ").replace(" and of at most 2147483647", "")
    return f"({plain.replace('of at', 'at')})" if plain else ""


def main(argv: list[str]) -> None:
    if argv == ["--table"]:
        (ROOT / "docs" / "training-arguments.md").write_text(table(), encoding="utf-8")
        return
    one_process_environment()
    trains = "--train" in argv
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        for field, flags in cases([item for item in argv if item != "--train"]):
            command = [*base_flags(folder), *flags]
            found, message = outcome(command, folder / "out", False)
            if found == "passed" and trains:
                found, message = outcome(command, folder / "out", True)
                found = {"passed": "trained", "refused": "refused late"}.get(found, found)
            row = {"field": field, "flags": " ".join(flags)[:100], "outcome": found, "message": message}
            print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
