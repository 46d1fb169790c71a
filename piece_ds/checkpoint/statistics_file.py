"""Saved statistics: a folder with one safetensors file per rank and an index, readable by any number of ranks.

With them another ratio, budget or method (of the same needs) is a selection, not a second pass over the data.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from piece_ds.checkpoint.fingerprint import model_fingerprint
from piece_ds.distributed import barrier, is_main
from piece_ds.errors import UserError
from piece_ds.files import write_json, write_whole
from piece_ds.state.partition import Layout, partition_of
from piece_ds.state.statistics import GradientStats, empty_stats

INDEX = "statistics.json"


def save_statistics(folder: Path | str, stats: GradientStats, source: dict[str, object] | None = None) -> None:
    """Write all ranks' statistics under folder. A collective; the index is written last, by rank 0.

    Args:
        source: what they are of (data file, batch size ...); compared by load_statistics.
    """
    folder, layout = Path(folder), stats.layout
    tensors = {}
    for info, part, offset in layout.owned():
        grad_sum, square_sum = stats.fragment(offset, part.numel)
        tensors[f"{info.name}.square_sum"] = square_sum.cpu().clone()
        if grad_sum is not None:
            tensors[f"{info.name}.grad_sum"] = grad_sum.cpu().clone()
    write_whole(folder / _shard(layout.rank, layout.num_ranks), lambda temporary: save_file(tensors, temporary))
    barrier()
    if is_main():
        write_json(
            folder / INDEX,
            {
                "format": "piece-statistics",
                "version": 1,
                "num_ranks": layout.num_ranks,
                "has_grad_sum": stats.grad_sum is not None,
                "num_micro_batches": stats.num_micro_batches,
                "num_nonfinite": stats.num_nonfinite,
                "model_fingerprint": model_fingerprint(layout),
                "source": source or {},
            },
        )
    barrier()


def has_statistics(folder: Path | str) -> bool:
    """True where save_statistics() has finished."""
    return (Path(folder) / INDEX).is_file()


def load_statistics(
    folder: Path | str,
    layout: Layout,
    needs_sum: bool,
    device: torch.device | str = "cpu",
    source: dict[str, object] | None = None,
) -> GradientStats:
    """This rank's statistics from a folder written by any number of ranks.

    Raises:
        UserError: not there, of another model, without the sum that the method needs, or of another source.
    """
    folder = Path(folder)
    if not has_statistics(folder):
        raise UserError(f"no statistics in {folder}: expected the file {INDEX}")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if index["model_fingerprint"] != model_fingerprint(layout):
        raise UserError(f"statistics in {folder} are of another model: parameter names or shapes differ")
    if needs_sum and not index["has_grad_sum"]:
        raise UserError(f"statistics in {folder} hold only sums of squares: piece-s needs the sum of gradients too")
    if source is not None and index["source"] != source:
        raise UserError(f"statistics in {folder} were taken of {index['source']}, not of {source}: use another folder")
    stats = empty_stats(layout, needs_sum, device)
    stats.num_micro_batches, stats.num_nonfinite = index["num_micro_batches"], index["num_nonfinite"]
    for owner in range(index["num_ranks"]):
        with safe_open(folder / _shard(owner, index["num_ranks"]), framework="pt") as file:
            for info, part, offset in layout.owned():
                stored = partition_of(info.numel, owner, index["num_ranks"])
                low, high = max(part.start, stored.start), min(part.stop, stored.stop)
                if low >= high:
                    continue
                targets = stats.fragment(offset + low - part.start, high - low)
                for key, target in zip(("grad_sum", "square_sum"), targets, strict=True):
                    if target is not None:
                        values = file.get_slice(f"{info.name}.{key}")[low - stored.start : high - stored.start]
                        target.copy_(values)
    return stats


def _shard(owner: int, num_ranks: int) -> str:
    return f"statistics-{owner:05d}-of-{num_ranks:05d}.safetensors"
