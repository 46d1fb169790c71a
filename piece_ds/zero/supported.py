"""Find the adapter for the way an engine keeps its gradients, or refuse the engine with a reason."""

from typing import Any

from piece_ds.config.deepspeed_features import refused_feature
from piece_ds.models.experts import unmarked_lists
from piece_ds.runtime.errors import UserError
from piece_ds.zero.adapter import Adapter
from piece_ds.zero.sequence_parallel import sequence_size
from piece_ds.zero.stage0 import Stage0
from piece_ds.zero.stage1_bf16 import Stage1BF16
from piece_ds.zero.stage3 import Stage3
from piece_ds.zero.stage12 import Stage12

# DeepSpeed's wrapper -> adapter. Anything else (ZenFlow, SuperOffload, MiCS, ...) is not here and is refused.
_ADAPTERS: dict[str, type[Adapter]] = {
    "DeepSpeedZeroOptimizer_Stage3": Stage3,
    "DeepSpeedZeroOptimizer": Stage12,
    "BF16_Optimizer": Stage1BF16,
    "FP16_Optimizer": Stage0,
    "FP16_UnfusedOptimizer": Stage0,
}

# Other engines -> why they are refused.
_ENGINES = {
    **dict.fromkeys(
        ("PipelineEngine", "DualPipeVEngine"), "ranks hold other layers, so no one has the model; use ZeRO-3 instead"
    ),
    "DeepSpeedHybridEngine": "it takes the weights apart to generate; set hybrid_engine.enabled to false",
}

# Optimizers for which a zero gradient with zero moments leaves an entry's bits alone, and whose weight decay is
# decoupled from the gradient, so that it can be restricted to selected entries.
PROVEN_OPTIMIZERS = ("AdamW", "Adam", "DeepSpeedCPUAdam", "FusedAdam")


def adapter_for(engine: Any) -> Adapter:
    """Return the adapter of a deepspeed.DeepSpeedEngine.

    Raises:
        UserError: the engine uses a feature with which masked updates have not been proven to be exact.
        RuntimeError: this DeepSpeed keeps its gradients under other names.
    """
    reason = _refusal(engine)
    if reason:
        raise UserError(f"piece_ds does not work with {reason}")

    # In fp32 at stage 0 there is no wrapper: the optimizer is the user's own.
    wrapper = type(engine.optimizer).__name__
    adapter = _ADAPTERS.get(wrapper)
    if adapter is None and engine.optimizer is engine.basic_optimizer and engine.zero_optimization_stage() == 0:
        adapter = Stage0
    if adapter is None:
        raise UserError(
            f"piece_ds does not know DeepSpeed's optimizer wrapper {wrapper}: use ZeRO stage 0, 1, 2 or 3 "
            "with a torch optimizer"
        )
    return adapter(engine)


def _refusal(engine: Any) -> str | None:
    """Return why this engine is refused, or None."""
    # Is it an engine of DeepSpeed, and an ordinary one?
    kind = type(engine).__name__
    if type(getattr(engine, "module", None)).__name__ == "DeepSpeedEngine":
        return f"a DeepSpeed engine inside {kind}: it reduces gradients itself; pass the engine, {kind}.module"
    if not hasattr(engine, "zero_optimization_stage"):
        return _is_no_engine(engine)
    if kind in _ENGINES:
        return f"{kind}: {_ENGINES[kind]}"
    if kind != "DeepSpeedEngine":
        return f"{kind}: only DeepSpeed's own engine is proven"

    # What it was told, and what its model brings.
    refused = refused_feature(engine._config._param_dict, of_command=False)
    if refused is not None:
        return refused
    if getattr(engine, "has_moe_layers", False):
        return (
            "DeepSpeed's MoE layers: expert gradients are reduced over other groups; use a model of transformers "
            "(Mixtral, Qwen3-MoE, DeepSeek-V3, gpt-oss), whose experts ZeRO shards as other weights"
        )
    if engine.autotp_size() > 0:
        return "AutoTP: ranks hold other parts of a weight under one name; set tensor_parallel.autotp_size to 0"
    if engine.is_deepcompile_active():
        return "DeepCompile: it compiles a reduction of its own; set compile.deepcompile to false"
    if engine.zero_optimization_stage() == 3:
        lost = unmarked_lists(engine.module)
        if lost is not None:
            return (
                f"experts in a list, {lost!r}, that ZeRO-3 gathers one by one: ranks that use different ones would "
                "wait for each other; call deepspeed.utils.set_z3_leaf_modules(model, "
                f"[{type(engine.module.get_submodule(lost)).__name__}]) before deepspeed.initialize()"
            )
    return _refused_with_sequences(engine) if sequence_size(engine) > 1 else None


def _refused_with_sequences(engine: Any) -> str | None:
    """Return what is refused of an engine whose ranks share rows, or None."""
    stage = engine.zero_optimization_stage()
    if stage == 3 and not engine.zero_reduce_scatter():
        return (
            "sequence parallelism at ZeRO-3 with reduce_scatter false: it averages large gradients over other numbers "
            "of ranks than small ones; remove zero_optimization.reduce_scatter"
        )
    wrapper = type(engine.optimizer).__name__
    if wrapper in ("FP16_Optimizer", "FP16_UnfusedOptimizer"):
        return (
            f"sequence parallelism in DeepSpeed's {wrapper} (16 bits at ZeRO-0): it looks for a group that sequence "
            "parallelism does not have; use ZeRO-2 or 3"
        )
    if wrapper == "BF16_Optimizer":
        return (
            f"sequence parallelism in DeepSpeed's BF16_Optimizer (bf16 at ZeRO-{stage} with fp32 gradients): its norm "
            "leaves out all parameters on every rank of a row but the first; use ZeRO-2 or 3"
        )
    config: Any = getattr(engine.module, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(text, "num_key_value_heads", None)
    if heads is not None and heads < sequence_size(engine):
        return (
            f"sequence parallelism over {sequence_size(engine)} ranks and {heads} key and value heads: DeepSpeed "
            "repeats the heads and leaves the model so, and evaluation then fails; share a row among at most "
            f"{heads} ranks"
        )
    return None


def require_engine(engine: Any) -> None:
    """Raise UserError if engine has no model inside: a bare model, or all that deepspeed.initialize() returned."""
    if not hasattr(engine, "module"):
        raise UserError(f"piece_ds does not work with {_is_no_engine(engine)}")


def _is_no_engine(engine: Any) -> str:
    return (
        f"{type(engine).__name__}, which is no DeepSpeed engine: pass what deepspeed.initialize() returned first, or "
        "what Accelerator.prepare() returned for the model with a DeepSpeedPlugin"
    )


def require_trainable(engine: Any) -> None:
    """Raise UserError if masked steps would not be exact with this optimizer, though statistics can be taken."""
    reason = _optimizer_refusal(engine)
    if reason:
        raise UserError(f"piece_ds cannot train with {reason}")


def _optimizer_refusal(engine: Any) -> str | None:
    base = engine.basic_optimizer
    name = type(base).__name__
    # By module too: other libraries have an AdamW of their own, with 8-bit states for instance.
    if name not in PROVEN_OPTIMIZERS or not type(base).__module__.startswith(("torch.optim", "deepspeed.ops")):
        return f"the optimizer {name}: a zero gradient may move a weight; use one of {', '.join(PROVEN_OPTIMIZERS)}"
    decoupled = name == "AdamW" or (name != "Adam" and getattr(base, "adam_w_mode", getattr(base, "adamw_mode", True)))
    if not decoupled and any(group.get("weight_decay", 0) for group in base.param_groups):
        return f"{name} with L2 weight decay: it would move weights outside the mask; use AdamW"
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        return (
            "fp16 at ZeRO stage 0: DeepSpeed 0.19 does not scale the loss there but unscales the gradient; "
            "use stage 1, 2 or 3"
        )
    return None
