"""What a training step costs: full fine-tuning, masked, compact, and peft's LoRA and SHiRA on the same model and data.

python bench/cost.py [--shape small|llama3-8b] [--ranks 2] [--repeats 9]

Time: all methods in one process group, step by step in turn, so that a busy machine slows all; ratios are medians over
rounds. Memory: each method in processes of its own; with --apart time too, for models of which only one fits. `zero`
is a ZeRO stage, 3-... (its settings are in cost_worker.py), or 'none' for one process without DeepSpeed. Writes
bench/results/cost-<device>.csv, where a method that ran out of memory has no time.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import deepspeed
import peft
import transformers

from bench.cost_methods import METHODS
from bench.cost_worker import SHAPES, ZERO3
from bench.record import device_name, write_rows

RESULTS = Path(__file__).resolve().parent / "results"
WORKER = Path(__file__).resolve().parent / "cost_worker.py"


def main() -> None:
    options = _options()
    rows: list[dict[str, Any]] = []
    versions = {"deepspeed": deepspeed.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    path = Path(options.output or RESULTS / f"cost-{device_name()}.csv")
    for dtype in options.dtypes:
        for zero in options.zero:
            if options.in_turn:
                found = _worker(options, zero, dtype, options.methods, options.repeats)
                measured = []
                for load in dict.fromkeys(key[1:] for key in found):
                    alone = {key[0]: {key[0]: row} for key, row in found.items() if key[1:] == load}
                    measured += [_with_ratios(alone, method) for method in alone]
            else:
                alone = {
                    m: _worker(options, zero, dtype, [m], options.repeats if options.apart else 2)
                    for m in options.methods
                }
                together = {} if options.apart else _worker(options, zero, dtype, options.methods, options.repeats)
                measured = [
                    {
                        **(_with_ratios(alone, method) if options.apart else together[method]),
                        "peak_bytes": alone[method][method]["peak_bytes"],
                    }
                    for method in options.methods
                ]
            for row in measured:
                rows.append(row)
                _print(row)
            if rows:  # what is there so far outlives whatever comes
                write_rows(path, rows, **versions)
    print(f"written to {path}")


def _worker(options: argparse.Namespace, zero: str, dtype: str, methods: list[str], repeats: int) -> dict[str, Any]:
    """Return method -> row, measured in a process group of its own."""
    with tempfile.NamedTemporaryFile() as file:
        arguments = [
            str(WORKER),
            "--shape",
            options.shape,
            "--zero",
            zero,
            "--dtype",
            dtype,
            "--output",
            file.name,
            "--repeats",
            str(repeats),
            "--layers",
            str(options.layers),
            "--rows",
            str(options.rows),
            "--tokens",
            str(options.tokens),
            *(["--checkpointing"] if options.checkpointing else []),
            *(["--in_turn"] if options.in_turn else []),
            *(["--workloads", *options.workloads] if options.workloads else []),
            "--methods",
            *methods,
        ]
        launcher = [
            "-m",
            "deepspeed.launcher.runner",
            "--num_gpus",
            str(options.ranks),
            "--master_port",
            str(29500 + os.getpid() % 1000),
        ]
        alone = options.ranks == 1  # a launcher would import torch and deepspeed twice more
        command = [sys.executable, *([] if zero == "none" or alone else launcher), *arguments]
        environment = dict(os.environ)
        if alone and zero != "none":
            environment |= {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "0",  # a free one
            }
        try:
            done = subprocess.run(
                command, capture_output=not options.in_turn, text=True, timeout=options.seconds or None, env=environment
            )
            failed = bool(done.returncode)
        except subprocess.TimeoutExpired:
            done, failed = None, True
        content = Path(file.name).read_bytes()
        if failed and not options.in_turn:
            assert done is not None
            sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        rows: dict[str, Any] = pickle.loads(content) if content else {}
    return rows


def _with_ratios(alone: dict[str, dict[str, Any]], method: str) -> dict[str, Any]:
    """Return a method's row with ratios to methods of other processes."""
    row = dict(alone[method][method])
    for other in ("full", "lora"):
        theirs = alone.get(other, {}).get(other, {}).get("step_ms")
        row[f"step_ms_ratio_to_{other}"] = round(row["step_ms"] / theirs, 3) if row["step_ms"] and theirs else ""
    return row


def _print(row: dict[str, Any]) -> None:
    print(
        f"{row['method']:<13} zero {row['zero']:<4} {row['dtype']} {row['tokens']:>5} tokens "
        f"{'checkpointing' * row['checkpointing']:<13}  "
        f"{row['step_ms'] or 'out of memory'!s:>13} ms  "
        f"{row['step_ms_ratio_to_full']!s:>5} x full  {row['step_ms_ratio_to_lora']!s:>5} x lora  "
        f"peak {(row['peak_bytes'] or 0) / 2**20:.0f} MiB  state {row['optimizer_state_bytes']}  "
        f"gradients {row['gradient_elements_per_step']}",
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--apart", action="store_true", help="one method at a time")
    parser.add_argument("--in_turn", action="store_true", help="one method at a time, all in one process")
    parser.add_argument("--layers", type=int, default=0, help="another number of layers than the shape's")
    parser.add_argument("--seconds", type=float, default=0, help="most for one process; what it has by then counts")
    parser.add_argument("--output", default="", help="another file than results/cost-<device>.csv")
    parser.add_argument("--rows", type=int, default=2, help="in a batch of one rank")
    parser.add_argument("--tokens", type=int, default=256, help="in a row")
    parser.add_argument(
        "--workloads",
        nargs="*",
        default=[],
        help="with --in_turn: several batches for each model, ROWSxTOKENS, with a 'c' at the end if activations are "
        "made again in backward; in the place of --rows, --tokens and --checkpointing",
    )
    parser.add_argument("--checkpointing", action="store_true", help="activations are made again in backward")
    parser.add_argument("--zero", nargs="+", choices=["none", "0", "1", "2", *ZERO3], default=["none", "3"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
