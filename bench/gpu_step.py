"""Where a training step goes: one step's operators, on the GPU and on the CPU.

python bench/gpu_step.py [--method compact] [--zero none|2|3|3-...] [--shape llama3-8b] [--layers 0] [--rows 2]
    [--tokens 256] [--steps 3] [--lines 25]

Prints the median step, the time the GPU worked in one, the number of launches, and torch.profiler's two tables.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.cost_methods import METHODS
from bench.cost_worker import SHAPES, ZERO3, _batch, _model, _trained
from piece_ds.runtime.process import start_distributed


def main() -> None:
    options = _options()
    if options.zero != "none":
        start_distributed()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = _trained(options.method, _model(options, device), options)
    batch = _batch(options, device)
    seconds = []
    for repeat in range(options.steps + 2):
        begin = time.perf_counter()
        trained.step(batch)
        _synchronize()
        if repeat >= 2:  # the first ones allocate
            seconds.append(time.perf_counter() - begin)
    print(f"step {1e3 * statistics.median(seconds):.2f} ms without the profiler")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        trained.step(batch)
        _synchronize()
    averages = found.key_averages()
    # Small kernels cost their launch: count them.
    launches = sum(event.count for event in averages if event.key.startswith("cudaLaunchKernel"))
    busy = sum(e.self_device_time_total for e in averages if e.device_type == DeviceType.CUDA)  # operators repeat it
    print(f"GPU at work {busy / 1e3:.2f} ms, {launches} launches")
    for order in ("self_device_time_total", "self_cpu_time_total"):
        print(averages.table(sort_by=order, row_limit=options.lines, max_name_column_width=60))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=list(METHODS), default="compact")
    parser.add_argument("--zero", choices=["none", "0", "1", "2", *ZERO3], default="none")
    parser.add_argument("--shape", choices=list(SHAPES), default="llama3-8b")
    parser.add_argument("--layers", type=int, default=0, help="another number of layers than the shape's")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256, help="in a row")
    parser.add_argument("--checkpointing", action="store_true")
    parser.set_defaults(workloads=[])
    parser.add_argument("--steps", type=int, default=3, help="timed without the profiler")
    parser.add_argument("--lines", type=int, default=25, help="of each table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
