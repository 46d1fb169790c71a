"""What selection and a round of statistics send per rank: counted at 2, 4 and 8 processes, beside the formula.

    python bench/traffic.py            # writes bench/results/traffic.csv; some minutes on 2 cores

The processes of a job are alone in a network namespace, so that all that crosses its loopback is theirs (with TCP's own
part and the barriers); without root the columns of the wire stay empty. Rows of 512 ranks have the formula alone.

Formulas, W ranks, P eligible parameters (tensors), n eligible elements; bytes that one rank receives in a ring:
    selection    2 (W - 1) / W x 8 (2^15 + 2 + 2048 + 1024 + 1024 + W P): the sampled histogram, the proof, three
                 histograms of digits, and each rank's ties in each parameter; nothing depends on n
    statistics   (W - 1) / W x n x itemsize: all-to-all of the gradients of a micro-batch on each rank
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from record import write_rows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import empty_model
from piece_ds.plan.shapes import KNOWN, known_config
from piece_ds.selection.candidates import SAMPLE_BITS
from piece_ds.selection.threshold import DIGITS
from piece_ds.state.statistics import empty_stats
from piece_ds.zero.exchange import exchange, plan_buckets
from piece_ds.zero.statistics import BUCKET_ELEMENTS

RANKS, RATIO, ITEMSIZE, FAR = (2, 4, 8), 0.001, 2, 512
WIDTHS = {"narrow": 128, "wide": 512}  # as many tensors, about 16 times the weights
_CLONE_NEWNET = 0x40000000


def selection_bytes(num_ranks: int, num_parameters: int) -> float:
    """Return the bytes that one rank receives in select() of one budget; see the formula above."""
    counts = (1 << SAMPLE_BITS) + 2 + sum(1 << bits for _, bits in DIGITS) + num_ranks * num_parameters
    return 2 * (num_ranks - 1) / num_ranks * 8 * counts


def statistics_bytes(num_ranks: int, num_elements: int) -> float:
    """Return the bytes that one rank receives in a round of statistics."""
    return (num_ranks - 1) / num_ranks * num_elements * ITEMSIZE


def main() -> None:
    """Measure, then extrapolate, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "traffic.csv")
    output = parser.parse_args().output
    rows = [measure(name, width, num_ranks) for name, width in WIDTHS.items() for num_ranks in RANKS]
    rows += [extrapolate(name) for name in KNOWN]
    write_rows(output, rows)
    for row in rows:
        print(row)


def measure(name: str, width: int, num_ranks: int) -> dict[str, Any]:
    """Return the row of one job of num_ranks processes in a namespace of its own."""
    with tempfile.TemporaryDirectory() as folder:
        leader = os.fork()
        if leader == 0:
            _lead(width, num_ranks, Path(folder))
        if os.waitpid(leader, 0)[1]:
            sys.exit(f"{name} on {num_ranks} processes failed")
        found = json.loads((Path(folder) / "found.json").read_text())
    return _row(name, num_ranks, found["parameters"], found["elements"], found["selection"], found["statistics"])


def extrapolate(name: str) -> dict[str, Any]:
    """Return a row with only the formulas."""
    eligible = layout_of(empty_model(known_config(name))).eligible()
    return _row(name, FAR, len(eligible), sum(info.numel for info in eligible), None, None)


def _row(
    name: str, num_ranks: int, parameters: int, elements: int, selection: float | None, statistics: float | None
) -> dict[str, Any]:
    return {
        "model": name,
        "ranks": num_ranks,
        "eligible_tensors": parameters,
        "eligible_elements": elements,
        "selection_wire_bytes": "" if selection is None else round(selection),
        "selection_formula_bytes": round(selection_bytes(num_ranks, parameters)),
        "statistics_wire_bytes": "" if statistics is None else round(statistics),
        "statistics_formula_bytes": round(statistics_bytes(num_ranks, elements)),
    }


def _lead(width: int, num_ranks: int, folder: Path) -> None:
    """Make the namespace, start the ranks in it, and wait for them. Runs in a child process, which ends here."""
    # Without root there is no namespace, and the wire cannot be counted.
    apart = ctypes.CDLL(None).unshare(_CLONE_NEWNET) == 0
    if apart:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    ranks = []
    for rank in range(num_ranks):
        ranks.append(os.fork())
        if ranks[-1] == 0:
            code = 1
            try:
                _be_rank(rank, num_ranks, width, folder, apart)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
    os._exit(int(any(os.waitpid(rank, 0)[1] for rank in ranks)))


def _be_rank(rank: int, num_ranks: int, width: int, folder: Path, apart: bool) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=num_ranks)
    layout = layout_of(_model(width))
    torch.manual_seed(rank)
    stats = empty_stats(layout, needs_sum=True, device="cpu")
    stats.square_sum.uniform_()
    stats.num_micro_batches = 1
    dist.barrier()
    before = _on_the_wire()
    select(layout, "piece-f", RATIO, stats)
    dist.barrier()
    selected = _on_the_wire()
    for bucket in plan_buckets(layout, BUCKET_ELEMENTS):
        names = {part.info.name: part.info.numel for part in bucket}
        for _ in exchange(bucket, {n: torch.zeros(size, dtype=torch.bfloat16) for n, size in names.items()}, layout):
            pass
    dist.barrier()
    exchanged = _on_the_wire()
    if rank == 0:
        eligible = layout.eligible()
        found = {
            "parameters": len(eligible),
            "elements": sum(info.numel for info in eligible),
            "selection": (selected - before) / num_ranks if apart else None,
            "statistics": (exchanged - selected) / num_ranks if apart else None,
        }
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _on_the_wire() -> int:
    """Return the bytes that have crossed this namespace's loopback."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def _model(width: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
