"""Refuse what DeepSpeed itself would refuse of its configuration, which it says only once the model is loaded."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.runtime import constants, lr_schedules
from deepspeed.runtime.config import DeepSpeedConfig

from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.zero.file_optimizer import REFUSALS, file_optimizer, reason_of, section_of

logger = logging.getLogger(__name__)

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

# Keys whose default is null; DeepSpeed fails later with other nulls.
_MAY_BE_NULL = ("communication_data_type", "seq_parallel_communication_data_type", "optimizer", "scheduler")

_GRADIENT_DTYPES = ("fp32", "bf16", "fp16")


def check_deepspeed_config(content: Mapping[str, Any], masked: bool) -> None:
    """Raise UserError if DeepSpeed cannot make an engine of a configuration; log keys that it does not know.

    Args:
        content: of the file, with transformers' values in place of "auto".
        masked: whether steps act on single weights, which needs AdamW.
    """
    _tell_unknown(content)
    nothing = next((key for key, value in content.items() if value is None and key not in _MAY_BE_NULL), None)
    if nothing is not None:
        raise UserError(f"--deepspeed: {nothing} is null: give it a value, or remove it")
    try:
        DeepSpeedConfig(copy.deepcopy(dict(content)))
    except Exception as error:
        if not isinstance(error, REFUSALS) and not type(error).__module__.startswith("deepspeed"):
            raise
        hint = ""
        if "train_micro_batch_size_per_gpu" not in content and "train_batch_size" not in content:
            hint = '; add "train_micro_batch_size_per_gpu": "auto"'
        raise UserError(f"--deepspeed: DeepSpeed refuses the configuration ({reason_of(error)}){hint}") from error
    dtype = (content.get("data_types") or {}).get("grad_accum_dtype")
    if dtype not in (None, *_GRADIENT_DTYPES):
        raise UserError(
            f"--deepspeed: data_types.grad_accum_dtype {dtype!r:.80} is none of {', '.join(_GRADIENT_DTYPES)}"
        )
    optimizer = file_optimizer(content, masked)
    _check_schedule(content, optimizer)


def _tell_unknown(content: Mapping[str, Any]) -> None:
    known = {value for name, value in vars(constants).items() if name.isupper() and isinstance(value, str)}
    known |= _SECTIONS
    for key in content:
        if key not in known and is_main():
            logger.warning(
                "--deepspeed: DeepSpeed does not know %r and ignores it.%s", key, nearest(key, sorted(known))
            )


def _check_schedule(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    if not content.get("scheduler"):
        return
    section = section_of(content, "scheduler")
    name, options = str(section["type"]), dict(section.get("params") or {})
    kind = getattr(lr_schedules if name in lr_schedules.VALID_LR_SCHEDULES else torch.optim.lr_scheduler, name, None)
    if not isinstance(kind, type):
        known = lr_schedules.VALID_LR_SCHEDULES
        raise UserError(f"--deepspeed: scheduler {name} is unknown; known: {', '.join(known)}.{nearest(name, known)}")
    if section.get("params") is None:
        raise UserError(f'--deepspeed: scheduler {name} has no params, which DeepSpeed needs: add "params": {{}}')
    try:
        schedule = kind(optimizer, **options)
        for _ in range(3):
            optimizer.step()
            schedule.step()
    except REFUSALS as error:
        raise UserError(f"--deepspeed: scheduler {name} with {options} cannot be made: {reason_of(error)}") from error
