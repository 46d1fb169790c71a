"""Runs of three tasks without training: a base model, a delta per task as save_delta writes it, and the final model."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from piece_ds.checkpoint.delta_file import save_delta
from piece_ds.models.layout import layout_of
from piece_ds.state.mask import Mask
from piece_ds.zero.weights import read_selected
from support.models import cast_parameters, embedding_name, make_model

NUM_TASKS = 3
SHARD_BYTES = 20_000  # three files or more of the tiny models


@dataclass(frozen=True)
class Run:
    """Folders and files of one made-up run."""

    base: Path
    final: Path
    folder: Path
    deltas: list[Path]


def make_run(
    root: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.bfloat16,
    sharded: bool = False,
    select: Callable[[str], bool] | None = None,
    with_previous: bool = True,
    density: float = 0.05,
) -> Run:
    """Write base/, run/NN-task/delta.safetensors and final/ under root.

    Args:
        select: parameters that may be selected; None means all but the embedding.
        density: share of their elements that each task changes; masks of tasks overlap.
    """
    model = cast_parameters(make_model(family), dtype)
    model.config.dtype = dtype
    size = SHARD_BYTES if sharded else "1GB"
    model.save_pretrained(root / "base", max_shard_size=size)
    deltas = []
    for task in range(NUM_TASKS):
        mask = random_mask(model, task, density, select or (lambda name: name != embedding_name(family)))
        previous = read_selected(model, mask)
        move_selected(model, mask, task)
        deltas.append(root / "run" / f"{task:02d}-task" / "delta.safetensors")
        save_delta(deltas[-1], model, mask, previous, with_previous)
    model.save_pretrained(root / "final", max_shard_size=size)
    return Run(root / "base", root / "final", root / "run", deltas)


def random_mask(model: nn.Module, seed: int, density: float, select: Callable[[str], bool]) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    layout, index = layout_of(model), {}
    for info in layout.parameters:
        positions = (torch.rand(info.numel, generator=generator) < density).nonzero().view(-1)
        if select(info.name) and positions.numel():
            index[info.name] = positions
    return Mask(layout, index, sum(positions.numel() for positions in index.values()), "piece-s", density)


def move_selected(model: nn.Module, mask: Mask, seed: int) -> None:
    """Other values where the mask is."""
    generator = torch.Generator().manual_seed(100 + seed)
    params = dict(model.named_parameters())
    for name, index in mask.index.items():
        flat = params[name].data.view(-1)
        flat[index] += (0.05 * torch.randn(index.numel(), generator=generator)).to(flat.dtype)


def sha256_of(folder: Path) -> dict[str, str]:
    """Every file below a folder by its sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
