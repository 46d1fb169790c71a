"""Bytes of tensors that a training step leaves alive on rank 0: plain fine-tuning, masked mode, compact mode.

deepspeed --num_accelerators 2 bench/memory.py [--hidden 512 --layers 6 --stages 2 3]

Counts every storage that Python can reach (weights, masters, moments, gradient buffers), on any device; allocators'
reserves and activations are not in it. Prints a table and writes bench/results/memory-<ranks>-ranks.csv.
"""

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from bench.record import write_rows
from piece_ds import attach, layout_of, prepare_compact, select
from piece_ds.runtime.process import start_distributed

RATIO = 0.001
MODES = ("plain", "masked", "compact")


def main() -> None:
    options = _options()
    start_distributed()
    rows = [_measure(mode, stage, options) for stage in options.stages for mode in MODES]
    if dist.get_rank() == 0:
        path = Path(__file__).resolve().parent / "results" / f"memory-{dist.get_world_size()}-ranks.csv"
        write_rows(path, rows, deepspeed=deepspeed.__version__)
        for row in rows:
            size = f"{row['bytes'] / 1e6:8.1f} MB  {row['bytes_per_param']:.2f} bytes a parameter"
            print(f"ZeRO-{row['zero']} {row['mode']:<8} {size}")
        print(f"{rows[0]['params'] / 1e6:.1f} M parameters in bf16, {dist.get_world_size()} ranks; written to {path}")


def _measure(mode: str, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    before = _alive_bytes()
    model = _model(options)
    num_params = sum(param.numel() for param in model.parameters())
    trained = [param for param in model.parameters() if param.requires_grad]
    if mode == "compact":
        trained = list(prepare_compact(model, RATIO).parameters())
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": stage, "reduce_bucket_size": options.hidden**2},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if mode != "plain":
        attach(engine, select(layout_of(engine.module), "random", RATIO))
    ids = torch.randint(0, options.vocab, (1, options.tokens)).to(engine.device)
    # The second step has all state that the first one makes.
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss * 1.0)
        engine.step()
    alive = _alive_bytes() - before
    engine.empty_partition_cache()
    engine.destroy()
    return {
        "mode": mode,
        "zero": stage,
        "dtype": "bf16",
        "world": dist.get_world_size(),
        "params": num_params,
        "ratio": RATIO,
        "bytes": alive,
        "bytes_per_param": round(alive / num_params, 3),
    }


def _alive_bytes() -> int:
    """Return the bytes of all storages that are alive, each counted once."""
    gc.collect()
    found = {}
    for candidate in gc.get_objects():
        if type(candidate) in (torch.Tensor, torch.nn.Parameter):
            for tensor in (candidate, candidate.grad if candidate.is_leaf else None):
                if tensor is not None:
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(found.values())


def _model(options: argparse.Namespace) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=4 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        max_position_embeddings=options.tokens,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
