"""One process of bench/cost.py: methods that take turns on one model shape, precision and ZeRO stage."""

import argparse
import gc
import os
import pickle
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from bench.cost_methods import Trained, with_deepspeed, without_deepspeed
from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.process import start_distributed

SHAPES = {
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 2048,
    },
    # 102 M parameters: 12 blocks of 7.1 M and a vocabulary of 8 192.
    "small": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 8192,
    },
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Settings of ZeRO-3 to compare: fetched one by one as by default, far ahead, or kept whole once gathered.
ZERO3 = {
    "3": {},
    "3-ahead": {"stage3_prefetch_bucket_size": int(5e8), "overlap_comm": True, "contiguous_gradients": True},
    "3-large": {
        "stage3_prefetch_bucket_size": int(5e8),
        "reduce_bucket_size": int(5e8),
        "stage3_max_live_parameters": int(4e9),
        "stage3_max_reuse_distance": int(4e9),
    },
    "3-granular": {"stage3_module_granularity_threshold": int(1e9)},
    "3-persistent": {"stage3_param_persistence_threshold": int(1e9), "stage3_model_persistence_threshold": int(1e12)},
}


def main() -> None:
    options = _options()
    if options.zero != "none":
        start_distributed()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size()))
    if options.in_turn:
        _in_turn(options, device)
        return
    # What the process holds before any model is no method's.
    before = _peak_bytes()
    contestants: dict[str, Trained] = {}
    seconds: dict[str, list[float]] = {}
    num_params = 0
    try:
        for method in options.methods:
            model = _model(options, device)
            num_params = sum(p.numel() for p in model.parameters())
            contestants[method] = _trained(method, model, options)
            del model
        seconds = _race(contestants, _batch(options, device), options.repeats)
    except torch.OutOfMemoryError:
        if len(options.methods) > 1:
            raise
    peak = _peak_bytes() - before if seconds else None
    rows = {method: _row(method, options, num_params, seconds, contestants, peak) for method in options.methods}
    _write(rows, options)


def _in_turn(options: argparse.Namespace, device: torch.device) -> None:
    """Measure one method after another in this process. Each is alone in memory; rows are written at once."""
    rows: dict[str, Any] = {}
    for method in options.methods:
        _free()
        before, num_params, contestants = _used_bytes(), 0, {}
        failure, model = "", None
        try:
            model = _model(options, device)
            num_params = sum(p.numel() for p in model.parameters())
            contestants[method] = _trained(method, model, options)
        except Exception as error:  # the other methods can still be measured
            failure = _said(error)
        for rows_of_batch, tokens, checkpointing in options.workloads or [(options.rows, options.tokens, None)]:
            options.rows, options.tokens = rows_of_batch, tokens
            if model is not None and checkpointing is not None:
                options.checkpointing = checkpointing
                _set_checkpointing(model, checkpointing)
            seconds = {}
            if not failure:
                _free()
                try:
                    seconds = _race(contestants, _batch(options, device), options.repeats)
                except Exception as error:
                    failure = _said(error)
            peak = _peak_bytes() - before if seconds else None
            name = (method, rows_of_batch, tokens, options.checkpointing)
            rows[name] = _row(method, options, num_params, seconds, contestants, peak) | {"failure": failure}
            print(
                f"{method:<8} zero {options.zero} {options.dtype} {name[1:]} {rows[name]['step_ms'] or failure} ms",
                flush=True,
            )
            _write(rows, options)
        model = None
        for trained in contestants.values():
            with suppress(Exception):
                trained.close()
        contestants.clear()


def _said(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    traceback.print_exc()
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _set_checkpointing(model: LlamaForCausalLM, wanted: bool) -> None:
    """Let activations be made again in backward, or be kept."""
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


def _free() -> None:
    """Free what was measured last. Engines are reference cycles, so they need the collector."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _used_bytes() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _peak_bytes()


def _write(rows: dict[str, Any], options: argparse.Namespace) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(options.output).write_bytes(pickle.dumps(rows))


def _trained(method: str, model: LlamaForCausalLM, options: argparse.Namespace) -> Trained:
    if options.zero == "none":
        return without_deepspeed(method, model)
    return with_deepspeed(method, model, _config(options))


def _race(contestants: dict[str, Trained], batch: dict[str, torch.Tensor], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {method: [] for method in contestants}
    for repeat in range(repeats + 2):
        for method, trained in contestants.items():
            taken = _timed(lambda trained=trained: trained.step(batch))  # type: ignore[misc]
            if repeat >= 2:  # the first ones allocate
                seconds[method].append(taken)
    return seconds


def _row(
    method: str,
    options: argparse.Namespace,
    num_params: int,
    seconds: dict[str, list[float]],
    contestants: dict[str, Trained],
    peak: int | None,
) -> dict[str, Any]:
    def ratio_to(other: str) -> float | str:
        if not {method, other} <= seconds.keys():
            return ""
        return round(statistics.median(a / b for a, b in zip(seconds[method], seconds[other], strict=True)), 3)

    return {
        "method": method,
        "params": num_params,
        "layers": options.layers or SHAPES[options.shape]["num_hidden_layers"],
        "world": world_size(),
        "zero": options.zero,
        "dtype": options.dtype,
        "tokens": options.rows * options.tokens,
        "checkpointing": int(options.checkpointing),
        "step_ms": round(1e3 * statistics.median(seconds[method]), 2) if seconds else "",
        "tokens_per_s": round(options.rows * options.tokens / statistics.median(seconds[method])) if seconds else "",
        "step_ms_ratio_to_full": ratio_to("full"),
        "step_ms_ratio_to_lora": ratio_to("lora"),
        "peak_bytes": "" if peak is None else peak,
        "optimizer_state_bytes": contestants[method].state_bytes() if seconds else "",
        "gradient_elements_per_step": contestants[method].num_gradients if seconds else "",
    }


def _timed(function: Callable[[], None]) -> float:
    """Return the seconds of one call on the slowest rank."""
    _synchronize()
    begin = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _peak_bytes() -> int:
    """Return the most memory in use so far: the allocator's on a GPU, the process's on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _model(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    longest = max([options.tokens, *(tokens for _, tokens, _ in options.workloads)])
    config = LlamaConfig(max_position_embeddings=longest, use_cache=False, **shape)
    torch.set_default_dtype(DTYPES[options.dtype])
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.get_input_embeddings().weight.requires_grad_(False)
    if options.checkpointing:
        _set_checkpointing(model, True)
    return model.train()


def _config(options: argparse.Namespace) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.rows,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": int(options.zero[0]), **ZERO3.get(options.zero, {})},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
    }
    if options.dtype == "bf16":
        config["bf16"] = {"enabled": True}
        if options.zero[0] in "23":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _batch(options: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    ids = torch.randint(0, SHAPES[options.shape]["vocab_size"], (options.rows, options.tokens), generator=generator).to(
        device
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def workload(text: str) -> tuple[int, int, bool]:
    """Return (rows, tokens, checkpointing) of 'ROWSxTOKENS' or 'ROWSxTOKENSc'."""
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens.removesuffix("c")), text.endswith("c")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--zero", choices=["none", "0", "1", "2", *ZERO3], required=True)
    parser.add_argument("--dtype", choices=list(DTYPES), required=True)
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--layers", type=int, default=0, help="another number of layers than the shape's")
    parser.add_argument("--in_turn", action="store_true", help="one method after another, each alone in memory")
    parser.add_argument("--rows", type=int, default=2, help="in a batch of one rank")
    parser.add_argument("--tokens", type=int, default=256, help="in a row")
    parser.add_argument("--checkpointing", action="store_true", help="activations are made again in backward")
    parser.add_argument("--workloads", type=workload, nargs="*", default=[], help="see bench/cost.py")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
