"""Real rows of a real model, padded against packed: losses, statistics, tokens per second and peak memory.

python bench/packing.py --trace FOLDER [--tasks FOMC ScienceQA --rows 8 --batch_size 4]

FOLDER/TASK/train.json holds the rows, as TRACE has them. For each task the statistics pass (forward and backward of
every micro-batch) reads the first rows in fp32, padded and packed, on one process at ZeRO-2. Tokens are those of the
rows, without padding. Prints a table and writes bench/results/packing-<device>.csv.
"""

import argparse
import ctypes
import gc
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import torch
from torch import Tensor

from bench.record import device_name, write_rows
from piece_ds.config.settings import load_settings
from piece_ds.data.collate import MicroBatches
from piece_ds.data.packing import training_collator
from piece_ds.data.tasks import Task
from piece_ds.models.loading import freeze_ineligible, load_model
from piece_ds.preflight.inputs import load_inputs
from piece_ds.runtime.process import one_process_environment
from piece_ds.runtime.profiling import host_peak_bytes, reset_peaks
from piece_ds.training.engines import statistics_engine
from piece_ds.zero.statistics import collect_statistics


def main() -> None:
    options = _options()
    one_process_environment()
    argv = ["--model_name_or_path", options.model, "--dtype", "float32", "--deepspeed", "zero2", "--output_dir", "none"]
    argv += ["--task_dir", options.trace, "--tasks", ",".join(options.tasks), "--max_train_samples", str(options.rows)]
    argv += ["--max_eval_samples", "1", *([] if torch.cuda.is_available() else ["--use_cpu", "True"])]
    inputs = load_inputs(load_settings(argv))
    model = load_model(inputs.settings.model, torch.float32)
    freeze_ineligible(model)
    engine = statistics_engine(model, inputs.arguments)

    # Padded first, then packed, task by task.
    rows = []
    for task in inputs.tasks:
        padded, sums = _measure(engine, task, training_collator(inputs.tokenizer, False), options.batch_size)
        packed, others = _measure(engine, task, training_collator(inputs.tokenizer, True), options.batch_size)
        differences = [abs(a - b) for a, b in zip(padded.pop("losses"), packed.pop("losses"), strict=True)]
        apart = max(float((sums[name] - others[name]).abs().max() / sums[name].abs().max()) for name in sums)
        for kind, found in (("padded", padded), ("packed", packed)):
            rows.append({"task": task.name, "kind": kind, **found, "loss_apart": max(differences), "sums_apart": apart})
            print(
                f"{task.name:<10} {kind}: {found['tokens_per_second']:7.1f} tokens/s, "
                f"{found['bytes'] / 2**20:7.0f} MiB above the model; losses apart by {max(differences):.1e}, sums by "
                f"{apart:.1e}",
                flush=True,
            )
    write_rows(Path(__file__).resolve().parent / "results" / f"packing-{device_name()}.csv", rows)


def _measure(engine: Any, task: Task, collate: Any, batch_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what the pass took, and its sums of gradients and of their squares."""
    losses: list[float] = []

    def loss_of(engine: Any, batch: Any) -> Tensor:
        loss: Tensor = engine(**batch).loss
        losses.append(loss.item())
        return loss * 1.0

    batches = replace(MicroBatches(task.train, collate, batch_size), loss_of=loss_of)
    num_tokens = sum(len(row["input_ids"]) for row in task.train)
    num_places = sum(batches[index]["input_ids"].numel() for index in range(len(batches)))
    on_gpu = torch.cuda.is_available()
    _give_back()
    reset_peaks()
    before = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    begin = time.perf_counter()
    stats = collect_statistics(engine, batches)
    seconds = time.perf_counter() - begin
    peak = torch.cuda.max_memory_allocated() if on_gpu else host_peak_bytes()
    found = {
        "rows": len(task.train),
        "batch_size": batch_size,
        "tokens": num_tokens,
        "places": num_places,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "bytes": int(peak or 0) - before,
        "loss": sum(losses) / len(losses),
        "losses": losses,
    }
    assert stats.grad_sum is not None
    return found, {"sum": stats.grad_sum.cpu(), "squares": stats.square_sum.cpu()}


def _give_back() -> None:
    """Return what earlier passes have freed to the system, so that no pass begins with memory to reuse."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", required=True, metavar="FOLDER")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["FOMC", "ScienceQA"])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=4)
    return parser.parse_args()


if __name__ == "__main__":
    main()
