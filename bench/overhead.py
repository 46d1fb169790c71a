"""What PIECE adds: the statistics pass against a plain forward and backward, the masked step against a plain step.

deepspeed --num_accelerators 2 bench/overhead.py [--hidden 512 --layers 8 --tokens 256 --rows 2 --repeats 7]

Both sides run alternately in one process group on the same model, so that a busy machine slows both; the ratio is the
result. Prints a table and writes bench/results/overhead-<device>.csv.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import torch
import torch.distributed as dist
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from bench.record import device_name, write_rows
from piece_ds import attach, collect_statistics, layout_of, select
from piece_ds.runtime.process import start_distributed

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    options = _options()
    start_distributed()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // dist.get_world_size()))
    rows = []
    for stage in options.stages:
        for dtype in options.dtypes:
            rows += _measure(stage, dtype, options)
            if dist.get_rank() == 0:
                _write(rows, options)


def _measure(stage: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    plain, masked, counted = (_engine(stage, dtype, options) for _ in range(3))
    batch = _batch(options, plain.device)
    layout = layout_of(masked.module)
    attach(masked, select(layout, "random", 0.001, device=masked.device))
    micro_batches = [{k: v.cpu() for k, v in batch.items()}] * dist.get_world_size()  # one for each rank

    def forward_backward(engine: Any) -> None:
        engine.backward(engine(**batch).loss * 1.0)

    times: dict[str, list[float]] = {key: [] for key in ("plain_pass", "statistics", "plain_step", "masked_step")}
    for repeat in range(options.repeats + 2):
        plain_pass = _timed(lambda: forward_backward(plain))
        plain_step = _timed(plain.step)
        masked_pass = _timed(lambda: forward_backward(masked))
        masked_step = _timed(masked.step)
        taken = _timed(lambda: collect_statistics(counted, micro_batches, layout=layout))
        if repeat >= 2:  # the first ones allocate
            times["plain_pass"].append(statistics.mean((plain_pass, masked_pass)))
            times["statistics"].append(taken)
            times["plain_step"].append(plain_step)
            times["masked_step"].append(masked_step)
    for engine in (plain, masked, counted):
        engine.empty_partition_cache()
        engine.destroy()
    # Steps alone are short: a training step is a pass and a step.
    one_pass = statistics.median(times["plain_pass"])
    return [
        _row("statistics pass / forward+backward", stage, dtype, options, times["statistics"], times["plain_pass"]),
        _row("masked step / plain step", stage, dtype, options, times["masked_step"], times["plain_step"]),
        _row(
            "training step with mask / without",
            stage,
            dtype,
            options,
            [one_pass + seconds for seconds in times["masked_step"]],
            [one_pass + seconds for seconds in times["plain_step"]],
        ),
    ]


def _row(
    what: str, stage: int, dtype: str, options: argparse.Namespace, ours: list[float], plain: list[float]
) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(ours, plain, strict=True))
    return {
        "what": what,
        "zero": stage,
        "dtype": dtype,
        "world": dist.get_world_size(),
        "params": options.params,
        "tokens": options.rows * options.tokens,
        "ms_p50": round(1e3 * statistics.median(ours), 2),
        "plain_ms_p50": round(1e3 * statistics.median(plain), 2),
        "ratio_p50": round(statistics.median(ratios), 3),
        "ratio_p20": round(ratios[len(ratios) // 5], 3),
        "ratio_p80": round(ratios[-1 - len(ratios) // 5], 3),
    }


def _timed(function: Callable[[], Any]) -> float:
    """Return the seconds of one call on the slowest rank."""
    _synchronize()
    dist.barrier()
    begin = time.perf_counter()
    function()
    _synchronize()
    seconds = torch.tensor(time.perf_counter() - begin)
    seconds = seconds.cuda() if torch.cuda.is_available() else seconds
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _engine(stage: int, dtype: str, options: argparse.Namespace) -> Any:
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
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.get_input_embeddings().weight.requires_grad_(False)
    options.params = sum(p.numel() for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": options.rows,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
    }
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
        if stage > 1:  # stages 0 and 1 accumulate in other ways
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def _batch(options: argparse.Namespace, device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(0, options.vocab, (options.rows, options.tokens), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _write(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    ranks = "" if dist.get_world_size() == 2 else f"-{dist.get_world_size()}-ranks"
    path = Path(options.output) if options.output else RESULTS / f"overhead-{device_name()}{ranks}.csv"
    write_rows(path, rows, deepspeed=deepspeed.__version__, transformers=transformers.__version__)
    print(f"{'what':<36} zero dtype     ms  plain ms  ratio (p20..p80)")
    for row in rows:
        print(
            f"{row['what']:<36} {row['zero']:>4} {row['dtype']:<5} {row['ms_p50']:>7.1f} {row['plain_ms_p50']:>8.1f}"
            f"  {row['ratio_p50']:.3f} ({row['ratio_p20']:.3f}..{row['ratio_p80']:.3f})"
        )
    print(f"{options.params / 1e6:.1f} M parameters, {rows[0]['world']} ranks; written to {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=256, help="in a row")
    parser.add_argument("--rows", type=int, default=2, help="in a micro-batch of one rank")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--output", default="", help="another file than results/overhead-<device>.csv")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser.parse_args()


if __name__ == "__main__":
    main()
