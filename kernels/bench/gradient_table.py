"""Measure when a sampled gradient beats the dense product, and put the rows into the table that the rule reads.

python kernels/bench/gradient_table.py [--output piece_ds/ops/sampled_gradients.csv] [--rounds 7]
    [--dtypes bf16 fp32] [--shapes 1024,1024,1024 2048,4096,1024] [--densities 0.001 0.01]

Rows of this kind of device and provider at the same dtype, shape and density are replaced, all others stay. The dense
contestant is the product alone; gathering from it is left out, which is in its favour.
"""

import argparse
import csv
import os
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from timing import Clock  # noqa: E402

from bench.record import commit_of  # noqa: E402
from piece_ds import ops  # noqa: E402
from piece_ds.ops.sampling_rule import DTYPES, TABLE  # noqa: E402

COLUMNS = ["device", "provider", "dtype", "tokens", "out", "in", "density", "k", "ratio", "torch", "commit", "date"]
KEY = COLUMNS[:7]
SHAPES = {"cpu": ["1024,1024,1024", "2048,4096,1024"], "cuda": ["1024,4096,4096", "4096,4096,4096", "4096,14336,4096"]}


def main() -> None:
    options = _options()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = "cpu" if device == "cpu" else torch.cuda.get_device_name().replace(" ", "-").lower()
    provider, clock = ops.load(device), Clock(device)
    path = Path(options.output)
    for shape in options.shapes or SHAPES[device]:
        tokens, num_out, num_in = (int(part) for part in shape.split(","))
        for dtype in options.dtypes:
            for density in options.densities:
                k = max(1, int(density * num_out * num_in))
                row = {"device": kind, "provider": provider, "dtype": dtype, "tokens": tokens, "out": num_out}
                row |= {"in": num_in, "density": density, "k": k}
                row["ratio"] = round(_ratio(clock, DTYPES[dtype], (tokens, num_out, num_in), k, options.rounds), 3)
                commit = os.environ.get("PIECE_DS_COMMIT") or commit_of()
                row |= {"torch": torch.__version__, "commit": commit, "date": date.today().isoformat()}
                _replace(path, row)
                print(" ".join(f"{name}={row[name]}" for name in COLUMNS[:9]), flush=True)


def _ratio(clock: Clock, dtype: torch.dtype, shape: tuple[int, int, int], k: int, num_rounds: int) -> float:
    tokens, num_out, num_in = shape
    grad_output = torch.randn(tokens, num_out, device=clock.device).to(dtype)
    x = torch.randn(tokens, num_in, device=clock.device).to(dtype)
    index = torch.randint(num_out * num_in, (2 * k,), device=clock.device).unique()
    index = index[torch.randperm(index.numel(), device=clock.device)[:k]].sort().values
    total = torch.zeros(index.numel(), device=clock.device)
    samples, _ = clock.rounds(
        {
            "sampled": lambda: ops.sampled_gradient_(grad_output, x, index, 1.0, total),
            "dense": lambda: grad_output.t() @ x,
        },
        lambda: None,
        num_rounds,
    )
    return samples["dense"].times_slower_than(samples["sampled"])


def _replace(path: Path, row: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    key = [str(row[name]) for name in KEY]
    rows = [other for other in rows if [other[name] for name in KEY] != key]
    rows.append(row)
    new = path.with_suffix(".new")
    with open(new, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(TABLE))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--shapes", nargs="+", default=[], help="tokens,out,in")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.001, 0.01])
    return parser.parse_args()


if __name__ == "__main__":
    main()
