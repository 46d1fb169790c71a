"""Every op against torch: time, share of the copy bandwidth, and how many times faster than its rivals.

python kernels/bench/run.py [--sizes 1000000 50000000] [--adamw_sizes 50000000 500000000] [--rounds 15]
    [--providers cpp] [--ops filter_] [--no_compile]

Writes kernels/bench/results/<device>.csv. Each provider runs in a process of its own; the rows with huge_pages = 1
come from one where torch's allocator uses them, which spares its rivals' new tensors most page faults.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from cases import Case, adamw_cases, cases
from timing import Clock

from bench.record import device_name, write_rows
from piece_ds import ops

RESULTS = Path(__file__).resolve().parent / "results"
RIVALS = ("authors", "best_eager", "compile", "topk")


def main() -> None:
    options = _options()
    if options.worker:
        Path(options.worker).write_bytes(pickle.dumps(_measure(options)))
        return
    rows: list[dict[str, Any]] = []
    for provider in options.providers:
        for huge_pages in (0, 1) if _device() == "cpu" else (0,):
            rows += _in_a_process(provider, huge_pages)
            path = Path(options.output or RESULTS / f"{device_name()}.csv")
            if rows:
                write_rows(path, rows)
    print(f"written to {path}")


def _in_a_process(provider: str, huge_pages: int) -> list[dict[str, Any]]:
    with tempfile.NamedTemporaryFile() as file:
        environment = {**os.environ, "PIECE_DS_BACKEND": provider, "THP_MEM_ALLOC_ENABLE": str(huge_pages)}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", file.name]
        subprocess.run(command, env=environment)
        content = Path(file.name).read_bytes()
        rows: list[dict[str, Any]] = pickle.loads(content) if content else []
    return rows


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    device = _device()
    provider = ops.load(device)
    clock = Clock(device)
    rows: list[dict[str, Any]] = []
    all_cases = chain(
        chain.from_iterable(cases(n, device, not options.no_compile) for n in options.sizes),
        chain.from_iterable(adamw_cases(n, device) for n in options.adamw_sizes),
    )
    for case in all_cases:
        if (
            options.ops
            and case.op.split()[0].rstrip(",") not in options.ops
            and not case.op.startswith("sparse_adamw_")
        ):
            continue
        rows.append(_row(case, provider, clock, options.rounds))
        _print(rows[-1])
        Path(options.worker).write_bytes(pickle.dumps(rows))  # outlives a case that fails
    return rows


def _row(case: Case, provider: str, clock: Clock, num_rounds: int) -> dict[str, Any]:
    samples, copies = clock.rounds({"run": case.run, **case.rivals}, case.prepare, num_rounds)
    ours = samples["run"]
    gbps = case.num_bytes / ours.quantile(0.5) / 1e6
    percent = [100 * case.num_bytes / ms / 1e6 / copy for ms, copy in zip(ours.ms, copies.ms, strict=True)]
    row: dict[str, Any] = {
        "op": case.op,
        "provider": provider,
        "dtype": case.dtype,
        "n": case.n,
        "ms_p50": round(ours.quantile(0.5), 4),
        "ms_p20": round(ours.quantile(0.2), 4),
        "ms_p80": round(ours.quantile(0.8), 4),
        "gbps": round(gbps, 2) if case.num_bytes else "",
        "copy_gbps": round(copies.quantile(0.5), 2),
        "pct_of_copy": round(sorted(percent)[len(percent) // 2], 1) if case.num_bytes else "",
    }
    for rival in RIVALS:
        row[f"x_{rival}"] = round(samples[rival].times_slower_than(ours), 2) if rival in samples else ""
    row["huge_pages"] = os.environ.get("THP_MEM_ALLOC_ENABLE", "0")
    return row


def _print(row: dict[str, Any]) -> None:
    ratios = "  ".join(f"{key} {row[key]}" for key in row if key.startswith("x_") and row[key] != "")
    print(
        f"{row['op']:<44} {row['provider']:<10} {row['dtype']:<5} {row['n']:>11} {row['ms_p50']:>9} ms "
        f"{row['pct_of_copy']!s:>6} % of copy  {ratios}",
        flush=True,
    )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1_000_000, 50_000_000])
    parser.add_argument(
        "--adamw_sizes",
        type=int,
        nargs="*",
        default=[50_000_000, 500_000_000],
        help="of sparse_adamw_; none: without it",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--providers", nargs="+", default=["cuda", "triton"] if _device() == "cuda" else ["cpp"])
    parser.add_argument("--ops", nargs="+", default=[], help="of the others, only these")
    parser.add_argument("--no_compile", action="store_true", help="do not race torch.compile")
    parser.add_argument("--output", default="", help="another file than results/<device>.csv")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
