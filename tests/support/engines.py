"""DeepSpeed engines of every kind under test, and reading them through DeepSpeed's public functions."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.state.selected_values import PARAMETER_NAME, selected_values

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setup:
    """One way to configure DeepSpeed.

    Attributes:
        stage: of ZeRO.
        dtype: fp32, bf16 or fp16.
        offload: '', 'optimizer' or 'all' (parameters too), to the CPU.
        zero: more keys of zero_optimization.
        config: more top-level keys.
    """

    stage: int
    dtype: str = "fp32"
    offload: str = ""
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def make_engine(model: nn.Module, setup: Setup, optimizer: Any, accumulation: int = 1, clip: float = 0.0) -> Any:
    """deepspeed.initialize with a client optimizer."""
    import deepspeed

    # Some parameters stay gathered (norms), others do not.
    zero: dict[str, Any] = {"stage": setup.stage, "stage3_param_persistence_threshold": 50}
    if setup.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if setup.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "zero_optimization": zero | setup.zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if setup.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if setup.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 8}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config | setup.config)
    return engine


def adamw(model: nn.Module, lr: float = 1e-2, weight_decay: float = 0.1) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """Copies of all the model's own parameters, whole, flat, in their dtype. A collective."""
    import deepspeed

    weights = {}
    for name, param in engine.module.named_parameters():
        if name == PARAMETER_NAME:
            continue
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            weights[name] = param.detach().cpu().reshape(-1).clone()
    return weights


def whole_masters(engine: Any) -> dict[str, Tensor]:
    """Copies of all fp32 masters, whole and flat, through DeepSpeed's public reader. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        if engine.bfloat16_enabled() or engine.fp16_enabled():
            masters = [m for group in engine.optimizer.fp32_groups for m in group]
            params = [p for group in engine.optimizer.fp16_groups for p in group]
            of = {id(p): m for p, m in zip(params, masters, strict=True)}
            return {
                n: of[id(p)].detach().reshape(-1).clone() for n, p in engine.module.named_parameters() if id(p) in of
            }
        values = selected_values(engine.module)
        return whole_weights(engine) if values is None else {PARAMETER_NAME: values.values.detach().clone()}
    if getattr(engine.optimizer, "round_robin_gradients", False):
        return _round_robin_masters(engine)
    return {
        name: safe_get_full_fp32_param(param).detach().cpu().reshape(-1).clone()
        for name, param in engine.module.named_parameters()
        if param.requires_grad and (selected_values(engine.module) is None or name == PARAMETER_NAME)
    }


def _round_robin_masters(engine: Any) -> dict[str, Tensor]:
    """DeepSpeed's public reader forgets that round_robin_gradients deals parameters out in another order."""
    optimizer, masters = engine.optimizer, {}
    names = {id(param): name for name, param in engine.module.named_parameters()}
    for group, own in enumerate(optimizer.single_partition_of_fp32_groups):
        parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, own.detach())
        flat = torch.cat(parts)
        offsets = optimizer.round_robin_bit16_offsets[group]
        for param, offset in zip(optimizer.round_robin_bit16_groups[group], offsets, strict=True):
            masters[names[id(param)]] = flat[offset : offset + param.numel()].clone()
    return masters
