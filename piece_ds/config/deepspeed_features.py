"""What of DeepSpeed's configuration masks are not proven with: one list, for its files and for engines.

docs/deepspeed.md has a line for every entry, with what is proven beside it; a test holds them together.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Feature:
    """One key of DeepSpeed's configuration that is refused with some values.

    Attributes:
        key: dotted, as in the file.
        allowed: values that change nothing, besides absence.
        reason: why others are refused.
        remedy: what to do instead.
        in_commands: refused only of the commands' files; an engine of the user's own may have it.
    """

    key: str
    allowed: tuple[Any, ...]
    reason: str
    remedy: str
    in_commands: bool = False


_ROUNDED = "weights or gradients are rounded, so that a mask is another one"
_MASTERS = "selected weights keep masters and moments in fp32"
_GONE = "DeepSpeed has removed it"
_OFF = "set it to false"

REFUSED = (
    # How states are sharded, and where they are.
    Feature("zero_optimization.stage", (0, 1, 2, 3), "there is no such stage", "use stage 0, 1, 2 or 3"),
    Feature("zero_optimization.zenflow", (None,), "it selects columns of the gradient itself", "remove it"),
    Feature("zero_optimization.offload_optimizer.device", ("none", "cpu"), "not proven", "use 'cpu'"),
    Feature("zero_optimization.offload_param.device", ("none", "cpu"), "not proven", "use 'cpu'"),
    Feature("zero_optimization.offload_optimizer.super_offload", (False,), "it replaces the step", "remove it"),
    Feature("zero_optimization.offload_optimizer.ratio", (1,), "a second optimizer steps a part", "remove it"),
    *(
        Feature(f"zero_optimization.{old}", (False,), "DeepSpeed has renamed it", f"use {new}", in_commands=True)
        for old, new in (
            ("cpu_offload", "offload_optimizer.device 'cpu'"),
            ("cpu_offload_params", "offload_param.device 'cpu'"),
        )
    ),
    Feature("zero_optimization.legacy_stage1", (False,), _GONE, "remove it"),
    Feature("zero_optimization.zero_quantized_weights", (False,), _ROUNDED, _OFF),
    Feature("zero_optimization.zero_quantized_nontrainable_weights", (False,), _ROUNDED, _OFF),
    Feature("zero_optimization.zero_quantized_gradients", (False,), _ROUNDED, _OFF),
    Feature("zero_optimization.mics_shard_size", (), _GONE, "remove it; zero_hpz_partition_size is proven"),
    Feature("zero_optimization.mics_hierarchical_params_gather", (), _GONE, "remove it"),
    Feature("zero_optimization.zeropp_loco_param", (), _GONE, "remove it"),
    # Other ways to divide a model.
    Feature("tensor_parallel.autotp_size", (0,), "ranks hold other parts of a weight under one name", "remove it"),
    Feature(
        "expert_parallel.enabled",
        (False,),
        "ranks hold other experts under one name",
        "set it to false: ZeRO shards experts as other weights",
    ),
    Feature(
        "sequence_parallel_size",
        (1,),
        "the commands have a flag for it",
        "use --sequence_parallel_size; a loop of your own may have it (piece_ds.sequence_loss)",
        in_commands=True,
    ),
    *(
        Feature(f"{monitor}.enabled", (False,), "each task would begin a record anew", "use --report_to", True)
        for monitor in ("tensorboard", "wandb", "comet", "csv_monitor")
    ),
    # How gradients are formed and averaged.
    Feature("managed_gradient_accumulation", (True,), "the Trainer says when a step is due", "remove it", True),
    Feature("compile.deepcompile", (False,), "it compiles a reduction of its own", _OFF),
    Feature("torch_autocast.enabled", (False,), "the gradient's dtype differs from module to module", "use --bf16"),
    Feature("gradient_allreduce_op", ("mean",), "steps are defined by the mean over ranks", "remove it"),
    Feature("prescale_gradients", (False,), "not proven: gradients are divided before they are added", _OFF),
    Feature("gradient_predivide_factor", (1,), "not proven: gradients are divided before they are added", "remove it"),
    Feature("bf16.bf16_master_weights_and_grads", (False,), _MASTERS, _OFF),
    Feature("bf16.bf16_optimizer_states", (False,), _MASTERS, _OFF),
    Feature("fp16.fp16_master_weights_and_grads", (False,), _MASTERS, _OFF),
    # What forward sees.
    Feature("data_efficiency.enabled", (False,), "it drops tokens, or orders rows, by the number of the step", _OFF),
    Feature("hybrid_engine.enabled", (False,), "its engine takes the weights apart to generate", _OFF),
    *(
        Feature(key, (), _GONE, "remove it")
        for key in (
            "amp",
            "compression_training",
            "curriculum_learning",
            "eigenvalue",
            "elasticity",
            "graph_harvesting",
            "nebula",
            "progressive_layer_drop",
            "quantize_training",
            "sparse_attention",
            "sparse_gradients",
        )
    ),
)


def refused_feature(content: Mapping[str, Any], of_command: bool) -> str | None:
    """Return what is refused of a configuration, and why, in one line; None if nothing is.

    Args:
        content: of a DeepSpeed file, or what an engine was made with.
        of_command: whether one of piece_ds' commands reads it.
    """
    for feature in REFUSED:
        value = _at(content, feature.key)
        harmless = value is None or value in feature.allowed
        if not harmless and (of_command or not feature.in_commands):
            shown = json.dumps(value, default=str)[:200]
            return f"{feature.key} {shown}; {feature.remedy}: {feature.reason}"
    return None


def _at(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content
