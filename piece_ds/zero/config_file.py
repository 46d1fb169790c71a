"""Refuse what DeepSpeed itself would refuse of its configuration, which it says only once the model is loaded."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime import constants, lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError, nearest

logger = logging.getLogger(__name__)

# What DeepSpeed raises for content that it cannot use: pydantic's errors are ValueErrors, its own are Exceptions.
_REFUSALS = (AssertionError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError)

# Keys at the top of a configuration that deepspeed.runtime.constants does not have.
_SECTIONS = frozenset(
    {
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "comet",
        "comms_logger",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "eigenvalue",
        "elasticity",
        "expert_parallel",
        "flops_profiler",
        "graph_harvesting",
        "hybrid_engine",
        "load_universal_checkpoint",
        "nebula",
        "pipeline",
        "progressive_layer_drop",
        "quantize_training",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "wandb",
        "weight_quantization",
        "zero_optimization",
    }
)

_GRADIENT_DTYPES = ("fp32", "bf16", "fp16")

# Options of Adam that DeepSpeed takes for itself, or for its own kernels.
_OF_DEEPSPEED_ADAM = ("torch_adam", "adam_w_mode", "bias_correction", "set_grad_none", "fp32_optimizer_states")


def check_deepspeed_config(content: Mapping[str, Any], masked: bool) -> None:
    """Raise UserError if DeepSpeed cannot make an engine of a configuration; log keys that it does not know.

    Args:
        content: of the file, with transformers' values in place of "auto".
        masked: whether steps act on single weights, which needs AdamW.
    """
    _tell_unknown(content)
    try:
        DeepSpeedConfig(copy.deepcopy(dict(content)))
    except Exception as error:
        if not isinstance(error, _REFUSALS) and not type(error).__module__.startswith("deepspeed"):
            raise
        hint = ""
        if "train_micro_batch_size_per_gpu" not in content and "train_batch_size" not in content:
            hint = '; add "train_micro_batch_size_per_gpu": "auto"'
        raise UserError(f"--deepspeed: DeepSpeed refuses the configuration ({_reason(error)}){hint}") from error
    dtype = (content.get("data_types") or {}).get("grad_accum_dtype")
    if dtype not in (None, *_GRADIENT_DTYPES):
        raise UserError(
            f"--deepspeed: data_types.grad_accum_dtype {dtype!r:.80} is none of {', '.join(_GRADIENT_DTYPES)}"
        )
    optimizer = _check_optimizer(content, masked)
    _check_schedule(content, optimizer)


def _tell_unknown(content: Mapping[str, Any]) -> None:
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    known |= _SECTIONS
    for key in content:
        if key not in known and is_main():
            logger.warning(
                "--deepspeed: DeepSpeed does not know %r and ignores it.%s", key, nearest(key, sorted(known))
            )


def _check_optimizer(content: Mapping[str, Any], masked: bool) -> torch.optim.Optimizer:
    """Return an optimizer on a dummy parameter like the one that the configuration describes."""
    dummy = [nn.Parameter(torch.zeros(2))]
    if not content.get("optimizer"):
        return torch.optim.AdamW(dummy)
    section = _section(content, "optimizer")
    name, options = str(section["type"]), dict(section.get("params") or {})

    # DeepSpeed makes its own of Adam and AdamW; other names are torch's.
    is_adam = name.lower() in ("adam", "adamw")
    kind = torch.optim.AdamW if is_adam else getattr(torch.optim, name, None)
    if masked and not is_adam:
        raise UserError(f"--deepspeed: optimizer {name}: a zero gradient may move a weight; use AdamW, or leave it out")
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise UserError(f"--deepspeed: optimizer {name} is neither AdamW nor one of torch.optim's: use --optim instead")
    stage = (content.get("zero_optimization") or {}).get("stage", 0)
    if not is_adam and stage and not content.get("zero_allow_untested_optimizer"):
        raise UserError(
            f"--deepspeed: optimizer {name} is untested with ZeRO, DeepSpeed says: add "
            '"zero_allow_untested_optimizer": true, or use AdamW'
        )
    if name.lower() == "adagrad":
        raise UserError(ADAGRAD.format(flag="--deepspeed: optimizer Adagrad"))
    try:
        known = {key: value for key, value in options.items() if not (is_adam and key in _OF_DEEPSPEED_ADAM)}
        made: torch.optim.Optimizer = kind(dummy, **known)
    except _REFUSALS as error:
        raise UserError(f"--deepspeed: optimizer {name} with {options} cannot be made: {_reason(error)}") from error
    return made


ADAGRAD = "{flag} ends in DeepSpeed's partitioning of gradients: use AdamW"


def _check_schedule(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    if not content.get("scheduler"):
        return
    section = _section(content, "scheduler")
    name, options = str(section["type"]), dict(section.get("params") or {})
    kind = getattr(lr_schedules if name in lr_schedules.VALID_LR_SCHEDULES else torch.optim.lr_scheduler, name, None)
    if not isinstance(kind, type):
        known = lr_schedules.VALID_LR_SCHEDULES
        raise UserError(f"--deepspeed: scheduler {name} is unknown; known: {', '.join(known)}.{nearest(name, known)}")
    try:
        schedule = kind(optimizer, **options)
        for _ in range(3):
            optimizer.step()
            schedule.step()
    except _REFUSALS as error:
        raise UserError(f"--deepspeed: scheduler {name} with {options} cannot be made: {_reason(error)}") from error


def _section(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = content[key]
    if not isinstance(section, Mapping) or not isinstance(section.get("type"), str):
        raise UserError(f"--deepspeed: {key} expects an object with a type, got {section!r:.200}")
    if not isinstance(section.get("params") or {}, Mapping):
        raise UserError(f"--deepspeed: {key}.params expects an object, got {section['params']!r:.200}")
    return section


def _reason(error: BaseException) -> str:
    """Return what a library says, in one line; of pydantic's list its first entry."""
    if hasattr(error, "errors"):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError | AssertionError) and text else f"{type(error).__name__}: {text}"
