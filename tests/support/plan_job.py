"""A job: engines of every stage, and what they really hold and send; results for test_plan_engines.py."""

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible
from piece_ds.plan.setting import Setting
from piece_ds.update.attach import attach, prepare_compact
from piece_ds.zero.statistics import collect_statistics
from support.jobs import Results, collect_case, finish, start
from support.launches import CONFIGS
from support.models import cast_parameters

NUM_RANKS, ACCUMULATION, RATIO = 2, 2, 0.01
HIDDEN = 128

SETTINGS = {
    f"zero{zero}-{dtype}{'-offload' if offload else ''}{'-all' if offload_param else ''}": Setting(
        update_mode="masked",
        world=NUM_RANKS,
        zero=zero,
        dtype=dtype,
        ratio=RATIO,
        accumulation=ACCUMULATION,
        offload_optimizer=offload,
        offload_param=offload_param,
    )
    for zero in (0, 1, 2, 3)
    for dtype in ("fp32", "bf16")
    for offload, offload_param in ((False, False), (True, False), (True, True))
    if zero >= (3 if offload_param else 2 if offload else 0) and not (offload and dtype == "fp32")
}

SETTINGS |= {
    f"compact{zero}-{dtype}": Setting(
        world=NUM_RANKS, zero=zero, dtype=dtype, ratio=RATIO, accumulation=ACCUMULATION, update_mode="compact"
    )
    for zero, dtype in ((0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32"))
}

# Mixtures of experts, as SETTINGS. Not with bf16 at stage 0, which keeps nothing of them that others do not.
SETTINGS |= {
    f"{family}-{mode}{zero}-bf16": Setting(
        world=NUM_RANKS, zero=zero, dtype="bf16", ratio=RATIO, accumulation=ACCUMULATION, update_mode=mode
    )
    for family, mode, zero in (
        ("qwen3-moe", "compact", 3),
        ("qwen3-moe", "masked", 2),
        ("qwen3-moe", "masked", 3),
        ("deepseek-v3", "compact", 3),
        ("deepseek-v3", "masked", 3),
    )
}

# What make test measures: every stage, mode, precision and way of offloading once, and one mixture of experts.
FAST = {
    "zero0-fp32",
    "zero2-bf16-offload",
    "zero3-bf16-offload-all",
    "compact2-bf16",
    "compact3-bf16",
    "qwen3-moe-compact3-bf16",
}

_COLLECTIVES = {
    "all_reduce": "all-reduce",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_to_all_single": "all-to-all",
}
_sent: Counter[str] = Counter()


def make_plan_model(name: str) -> nn.Module:
    """A setting's model: large beside what does not scale with it (norms, buckets), small beside a second of CPU."""
    torch.manual_seed(0)
    shape = {"hidden_size": HIDDEN, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
    model: nn.Module
    if name.startswith("qwen3-moe"):
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_key_value_heads=2, head_dim=32, **experts, **shape))
    elif name.startswith("deepseek-v3"):
        experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
        experts |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 48, "kv_lora_rank": 32}
        heads = {"num_key_value_heads": 4, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(intermediate_size=352, **heads, **experts, **shape))
    else:
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=352, num_key_value_heads=2, **shape))
    freeze_ineligible(model)
    return model


def main() -> None:
    _count_collectives()  # before DeepSpeed takes the functions
    start()
    gc.collect()
    gc.freeze()  # what the imports made is not looked through again
    results: Results = {}
    for name in sys.argv[2:]:
        setting = SETTINGS[name]
        collect_case(results, name, lambda name=name, setting=setting: measure(name, setting))  # type: ignore[misc]
    finish(results)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    """Bytes of all tensors that an engine brought into the process, and elements handed to collectives."""
    import deepspeed

    gc.collect()
    before = set(_storages())
    model = cast_parameters(make_plan_model(name), {"fp32": torch.float32, "bf16": torch.bfloat16}[setting.dtype])
    if setting.update_mode == "compact":
        prepare_compact(model, RATIO)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(setting))
    result: dict[str, Any] = {}

    def note(moment: str) -> None:
        looks = []
        for _ in range(3):  # gloo's threads may hold a bucket a moment longer than the call
            gc.collect()
            looks.append(sum(size for pointer, size in _storages().items() if pointer not in before))
            time.sleep(0.05)
        result[moment] = max(min(looks), result.get(moment, 0))

    batch = {"input_ids": torch.arange(16).view(1, 16), "labels": torch.arange(16).view(1, 16)}
    _sent.clear()
    stats = collect_statistics(engine, [batch, batch])
    result["statistics_sent"] = _sent["all-to-all"]
    note("statistics")
    result["statistics_bytes"] = sum(t.nbytes for t in (stats.grad_sum, stats.square_sum))
    del stats
    attach(engine, select(layout_of(engine.module), "random", RATIO))
    for step in range(2):  # moments appear with the first step
        _sent.clear()
        for micro_batch in range(ACCUMULATION):
            engine.backward(engine(**batch).loss)
            if step == 1:
                note("backward")
                if micro_batch == ACCUMULATION - 1:
                    engine.basic_optimizer.register_step_pre_hook(lambda *_: note("step"))
            engine.step()
            if step == 1 and micro_batch == 0:
                note("backward")
    result["sent"] = dict(_sent)
    result["wrapper"] = type(engine.optimizer).__name__
    engine.destroy()
    return result


def config_of(setting: Setting) -> dict[str, Any]:
    """The project's configuration with what transformers fills in for "auto"."""
    suffix = "_offload_all" if setting.offload_param else "_offload" if setting.offload_optimizer else ""
    config = json.loads((CONFIGS / f"zero{setting.zero}{suffix}.json").read_text())
    del config["train_batch_size"], config["fp16"]
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": setting.dtype == "bf16"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    values = {
        "reduce_bucket_size": HIDDEN**2,
        "stage3_prefetch_bucket_size": int(0.9 * HIDDEN**2),
        "stage3_param_persistence_threshold": 10 * HIDDEN,
    }
    zero = config["zero_optimization"]
    config["zero_optimization"] = {k: values[k] if v == "auto" else v for k, v in zero.items()}
    return config


def _storages() -> dict[int, int]:
    """Address -> bytes of the memory under every tensor of the process, gradients included."""
    found = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, nn.Parameter):
            for tensor in (item, item.grad):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found


def _count_collectives() -> None:
    """Let the collectives of torch.distributed count the elements of the larger of their tensors."""

    def counted(function: Callable[..., Any], collective: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            _sent[collective] += max(t.numel() for t in tensors)
            return function(*args, **kwargs)

        return call

    for name, collective in _COLLECTIVES.items():
        setattr(dist, name, counted(getattr(dist, name), collective))


if __name__ == "__main__":
    main()
