"""How many bytes an entry of a delta takes in each coding, for a model's shapes.

    python bench/delta_codings.py                                   # random positions over SmolLM2-135M's shapes
    python bench/delta_codings.py --delta NAME=FILE NAME=FILE ...   # deltas that training wrote

Writes bench/results/delta-codings.csv; half a minute. `positions` are the bytes of positions alone; `entropy` is the
least that any code of random positions takes, log2 of the number of ways to choose them.
"""

import argparse
import json
import tempfile
from math import lgamma, log, prod
from pathlib import Path
from typing import Any

import torch
from record import write_rows
from torch import Tensor
from transformers import AutoConfig

from piece_ds.checkpoint.delta_parts import CODINGS, write_parts
from piece_ds.checkpoint.gaps import encode_gaps
from piece_ds.deltas.delta import Delta, open_delta
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import empty_model
from piece_ds.models.pretrained import model_source
from piece_ds.state.partition import Layout

NUM_ENTRIES = 134_515  # 0.1 % of SmolLM2-135M
MODEL = "smollm2-135m"


def main() -> None:
    """Write one row a delta, coding and content."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delta", metavar="NAME=FILE", nargs="*", default=[], help="measured beside the random one")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "delta-codings.csv")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        random = Path(scratch) / "random.safetensors"
        write_random(random)
        named = {"random": random} | {
            name: Path(file) for name, file in (text.split("=", 1) for text in arguments.delta)
        }
        for name, path in named.items():
            rows += measured(name, open_delta(path), Path(scratch) / "again.safetensors")
    write_rows(arguments.output, rows)
    for row in rows:
        print(row)


def write_random(path: Path) -> None:
    """Write a delta of chosen_positions() in bf16."""
    layout = real_layout()
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for name, index in chosen_positions(layout).items():
        values = torch.randn(2, index.numel(), generator=generator).bfloat16()
        parts[name] = {"indices": index, "values": values[0].clone(), "previous": values[1].clone()}
    shapes = {name: list(layout.shapes()[name]) for name in parts}
    metadata = {"selected": str(NUM_ENTRIES), "total": str(layout.total), "shapes": json.dumps(shapes)}
    write_parts(path, parts, {info.name: info.numel for info in layout.parameters}, metadata)


def chosen_positions(layout: Layout) -> dict[str, Tensor]:
    """Return NUM_ENTRIES positions of the model's eligible elements, all equally likely."""
    eligible = list(layout.eligible())
    sizes = torch.tensor([info.numel for info in eligible])
    # Distinct positions in all parameters end to end, then each parameter's own.
    chosen = torch.randperm(int(sizes.sum()), generator=torch.Generator().manual_seed(0))[:NUM_ENTRIES].sort().values
    parts, begin = {}, 0
    for info in eligible:
        low, high = torch.searchsorted(chosen, torch.tensor([begin, begin + info.numel])).tolist()
        if high > low:
            parts[info.name] = chosen[low:high] - begin
        begin += info.numel
    return parts


def real_layout() -> Layout:
    """Return the parameters of the real model."""
    return layout_of(empty_model(AutoConfig.from_pretrained(model_source(MODEL)), trust_remote_code=False))


def measured(name: str, delta: Delta, scratch: Path) -> list[dict[str, Any]]:
    """Return the rows of one delta: with and without previous values, in each coding."""
    numel = {parameter: prod(shape) for parameter, shape in delta.shapes.items()}
    changes = dict(delta.changes())
    total = int(delta.metadata["total"])
    rows = []
    for with_previous in (True, False):
        parts = {
            parameter: {"indices": change.index, "values": change.values}
            | ({"previous": change.previous} if with_previous and change.previous is not None else {})
            for parameter, change in changes.items()
        }
        for coding in CODINGS:
            write_parts(scratch, parts, numel, delta.metadata, coding)
            size = scratch.stat().st_size
            coded = [encode_gaps(change.index).numel() for change in changes.values()]
            positions = 4 * delta.num_selected if coding == "indices" else sum(coded)
            rows.append(
                {
                    "delta": name,
                    "entries": delta.num_selected,
                    "coding": coding,
                    "previous_values": with_previous,
                    "file_bytes": size,
                    "bytes_per_entry": round(size / delta.num_selected, 3),
                    "position_bytes_per_entry": round(positions / delta.num_selected, 3),
                    "entropy_bytes_per_entry": round(entropy_bytes(total, delta.num_selected) / delta.num_selected, 3),
                    "model_bytes": 2 * total,
                    "times_smaller": round(2 * total / size),
                }
            )
    return rows


def entropy_bytes(total: int, chosen: int) -> float:
    """Return log2 of the ways to choose elements of a model, in bytes."""
    return (lgamma(total + 1) - lgamma(chosen + 1) - lgamma(total - chosen + 1)) / log(2) / 8


if __name__ == "__main__":
    main()
