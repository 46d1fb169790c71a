"""Refuse, before a weight is read, settings that do not fit each other or the data."""

import json
import logging
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from piece_ds import ops
from piece_ds.checkpoint.mask_file import check_mask_file
from piece_ds.config.deepspeed_configs import config_names
from piece_ds.config.deepspeed_features import refused_feature
from piece_ds.config.settings import Settings
from piece_ds.data.mixing import split_files
from piece_ds.methods.registry import find_method
from piece_ds.models.eligible import names_rows
from piece_ds.models.experts import stacked_experts
from piece_ds.models.loading import empty_layout, empty_model, reads_images
from piece_ds.preflight.general_flags import check_general_flags
from piece_ds.preflight.idle_settings import say_idle_settings
from piece_ds.runtime.distributed import is_main, world_size
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.runtime.places import why_no_file, why_no_folder

logger = logging.getLogger(__name__)

# transformers' names of those optimizers in zero/supported.py's PROVEN_OPTIMIZERS that it can make.
PROVEN_OPTIM = ("adamw_torch", "adamw_torch_fused", "adamw_apex_fused")


def check_method_reads_images(method: str, config: Any) -> None:
    """Raise UserError if the model reads images and the method is not proven with such models."""
    if reads_images(config) and not find_method(method).reads_images:
        raise UserError(
            f"--method {method} is not proven with models that read images (its adapters, memory or "
            "replayed rows may reach the vision tower); use a selection or seqft"
        )


def warn_of_stacked_experts(method: str, unit: str, config: Any, trust_remote_code: bool) -> None:
    """Say so if a method or a unit acts on matrices, which experts that are stacked into one parameter are not."""
    only_linear = find_method(method).only_linear
    if not is_main() or (unit == "element" and not only_linear):
        return
    model = empty_model(config, trust_remote_code)
    stacked = sum(param.numel() for module in stacked_experts(model).values() for param in module.parameters())
    total = sum(param.numel() for param in model.parameters())
    if stacked and only_linear:
        logger.warning(
            "--method %s acts on linear layers: it leaves the stacked experts out, %.1f %% of the model's weights",
            method,
            100 * stacked / total,
        )
    elif stacked:
        logger.warning(
            "--unit %s is of matrices: the stacked experts, %.1f %% of the model's weights, compete by element",
            unit,
            100 * stacked / total,
        )


def check_loss_chunks(settings: Settings) -> None:
    """Raise UserError if --loss_chunk_tokens is given and something needs the logits that it does not hold."""
    method = find_method(settings.method.method)
    needing = {
        f"--method {method.name}": method.baseline is not None and method.baseline.needs_logits,
        f"--general_kl {settings.method.general_kl:g}": settings.method.general_kl > 0,
    }
    asked = next((flag for flag, needs in needing.items() if needs), None)
    if settings.model.loss_chunk_tokens and asked is not None:
        raise UserError(
            f"--loss_chunk_tokens has no meaning with {asked}, which needs the logits of every answer token"
        )


def check_deepspeed_file(path: str | None) -> None:
    """Raise UserError unless path is a readable DeepSpeed configuration without what the engine would refuse later.

    Args:
        path: of a JSON file, or JSON text itself.
    """
    # Is it there, and is it JSON?
    if path is None or not (path.startswith("{") or _is_file(path)):
        raise UserError(
            f"--deepspeed {str(path)[:200]}: no such file; ds_configs/ has one for every ZeRO stage, and their names "
            f"do too: {', '.join(config_names())}.{nearest(str(path), config_names())}"
        )
    try:
        content = json.loads(path if path.startswith("{") else Path(path).read_text(encoding="utf-8"))
    except (RecursionError, OverflowError) as error:
        raise UserError(f"--deepspeed {path}: nested too deeply to be a configuration") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed {path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path[:200]} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed {path} must hold an object of settings, got {type(content).__name__}")
    if not content:
        raise UserError(f"--deepspeed {path} holds no setting: name a configuration such as zero3")

    # Is anything in it that has not been proven?
    refused = refused_feature(content, of_command=True)
    if refused is not None:
        raise UserError(f"--deepspeed {path}: piece_ds does not work with {refused}")


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def check_training(arguments: TrainingArguments, masked: bool) -> None:
    """Raise UserError if TrainingArguments ask for something that masked training is not proven with.

    Args:
        arguments: of the run.
        masked: whether steps act on single weights: by a mask, or by a step scale.
    """
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if masked and optimizer not in PROVEN_OPTIM:
        raise UserError(f"--optim {optimizer}: a zero gradient may move a weight; use one of {', '.join(PROVEN_OPTIM)}")
    resumes_from(arguments)


def check_offload(method: str, arguments: TrainingArguments) -> None:
    """Raise UserError if the optimizer is offloaded and the method changes the reduced gradient."""
    device = arguments.hf_deepspeed_config.get_value("zero_optimization.offload_optimizer.device", "none")
    if find_method(method).changes_gradient and device != "none":
        raise UserError(
            f"--method {method} changes the reduced gradient, which is not proven with optimizer offload: "
            "use a DeepSpeed configuration without zero_optimization.offload_optimizer"
        )


def check_overwrite(settings: Settings, root: Path) -> None:
    """Raise UserError if --overwrite_output_dir contradicts another flag or would remove what the run reads.

    Args:
        settings: of the run.
        root: --output_dir.
    """
    if not settings.output.overwrite_output_dir:
        return
    if resumes_from(settings.training_arguments()):
        raise UserError("--overwrite_output_dir and --resume_from_checkpoint exclude each other: give one of them")

    # Nothing that the run reads may lie in the folder that it removes.
    data, method = settings.data, settings.method
    read = {
        "model_name_or_path": settings.model.model_name_or_path,
        "mask_file": method.mask_file,
        "statistics_file": method.statistics_file,
        "peft_config": settings.baseline.peft_config,
        "general_statistics": method.general_statistics,
        "eval_file": data.eval_file,
        "task_dir": data.task_dir,
        "general_file": data.general_file,
        "general_text": data.general_text,
    }
    files = [("train_file", path) for path in (split_files(data.train_file) if data.train_file else ())]
    for name, path in (*read.items(), *files):
        if path is not None and Path(path).exists() and Path(path).resolve().is_relative_to(root.resolve()):
            raise UserError(f"--{name} {path} lies in --output_dir {root}, which --overwrite_output_dir would remove")


def check_places(settings: Settings) -> None:
    """Raise UserError if a file or folder beside --output_dir, which the job will write, cannot be written."""
    method = settings.method
    for name, path, why in (
        ("output_file", settings.output.output_file, why_no_file),
        ("statistics_file", method.statistics_file, why_no_folder),
        ("general_statistics", method.general_statistics, why_no_folder),
    ):
        reason = None if path is None else why(Path(path))
        if reason is not None:
            raise UserError(f"--{name} {str(path)[:200]} {reason}")


def check_kernels(method: str, arguments: TrainingArguments) -> None:
    """Raise UserError unless the ops that method needs can run on this device. They are built now if necessary."""
    if find_method(method).uses_ops:
        ops.load(arguments.device.type)


def resumes_from(arguments: TrainingArguments) -> bool:
    """Return --resume_from_checkpoint as yes or no. Where to resume is found in --output_dir.

    Raises:
        UserError: it names a checkpoint; a stream has one per task.
    """
    given = str(arguments.resume_from_checkpoint).lower()
    if given not in _RESUME:
        raise UserError(
            f"--resume_from_checkpoint expects True or False, got {arguments.resume_from_checkpoint!r}: "
            "where to go on is found in --output_dir"
        )
    return _RESUME[given]


_RESUME = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "none": False}


def check_mask(settings: Settings, config: Any) -> None:
    """Raise UserError if --mask_file is damaged or of another model. Only the model's configuration is needed."""
    if settings.method.mask_file is None:
        return
    if not find_method(settings.method.method).has_mask:
        raise UserError(f"--mask_file has no meaning with --method {settings.method.method}, which has no mask")
    check_mask_file(settings.method.mask_file, empty_layout(settings.model, config))


def check_sources(settings: Settings, num_tasks: int) -> None:
    """Raise UserError if a method lacks what it selects by, or a setting is given that it would ignore.

    Args:
        settings: of the run.
        num_tasks: of the stream.
    """
    flags, method = settings.method, find_method(settings.method.method)
    check_general_flags(settings, num_tasks)
    say_idle_settings(settings, method)

    # What the method needs.
    if method.needs_earlier_tasks and num_tasks < 2:
        raise UserError(
            f"--method {method.name} avoids earlier tasks' weights: it needs a stream (--task_dir, --tasks)"
        )

    # What a chain of deltas needs.
    if "delta_coding" in settings.given and not method.has_mask:
        raise UserError(f"--delta_coding has no meaning with --method {method.name}, which has no mask and no deltas")
    if settings.output.delta_every is not None and not method.has_mask:
        raise UserError(f"--delta_every has no meaning with --method {method.name}, which has no mask and no deltas")

    # What it would ignore.
    if method.has_mask and method.estimator is None and flags.statistics_file:
        raise UserError(
            f"--statistics_file has no meaning with --method {method.name}: statistics that any ratio "
            "can use are those of piece-s and piece-f"
        )
    if method.has_mask and method.estimator is None and flags.budget != "model":
        raise UserError(f"--budget {flags.budget} has no meaning with --method {method.name}, which has its own")

    # With a given mask nothing is selected, so selection's settings have no meaning.
    if flags.unit != "element" and flags.mask_file:
        raise UserError(f"--unit {flags.unit} has no meaning with --mask_file, which says what is selected")
    if flags.unit != "element" and not method.has_units:
        raise UserError(
            f"--unit {flags.unit} has no meaning with --method {method.name}, which does not choose by scores of "
            "elements; use it with piece-s, piece-f, piece-ratio, random or magnitude"
        )
    if settings.baseline.peft_config and not (method.baseline and method.baseline.reads_peft_config):
        raise UserError(f"--peft_config has no meaning with --method {method.name}: use --method peft")
    if flags.importance_rows and not (method.has_mask and flags.mask_file is None):
        raise UserError(
            f"--importance_rows has no meaning with {'--mask_file' if flags.mask_file else f'--method {method.name}'}: "
            "nothing is estimated"
        )
    if settings.model.exclude and flags.mask_file:
        raise UserError("--exclude has no meaning with --mask_file, which says what is selected")
    if settings.model.exclude and method.baseline is not None and method.baseline.saves_itself:
        raise UserError(f"--exclude has no meaning with --method {method.name}, which trains adapters")
    if names_rows(settings.model.eligible) and not method.has_mask:
        raise UserError(f"--eligible with rows needs a method with a mask: --method {method.name} trains whole tensors")


def check_accumulation(name: str, rows: int, arguments: TrainingArguments, allow_smaller: bool) -> None:
    """Raise UserError if the last step of an epoch would accumulate fewer micro-batches than the others.

    That step's rows would weigh more than others. The user must want this.

    Args:
        name: of the task.
        rows: number of its training rows.
        arguments: of the run.
        allow_smaller: log a warning instead.
    """
    # How the rows divide into micro-batches and steps.
    accumulation = arguments.gradient_accumulation_steps
    per_round = arguments.per_device_train_batch_size * world_size()
    rounds = rows // per_round if getattr(arguments, "dataloader_drop_last", False) else -(-rows // per_round)
    steps = -(-rounds // accumulation)
    ends_early = 0 < arguments.max_steps <= rounds // accumulation
    if rounds % accumulation == 0 or ends_early:
        return

    # Say by how much the last step is smaller.
    left = rounds % accumulation
    message = (
        f"task {name}: {rows} rows make {rounds} micro-batches of {arguments.per_device_train_batch_size} rows on "
        f"{world_size()} ranks, and gradient_accumulation_steps is {accumulation}: the last of {steps} steps of an "
        f"epoch would accumulate {left} instead of {accumulation}"
    )
    if not allow_smaller:
        raise UserError(f"{message}; change the batch, or accept it with --incomplete_accumulation smaller_step")
    logger.warning("%s", message)
