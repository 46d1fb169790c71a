"""Write a delta as an adapter of PEFT, for PeftModel.from_pretrained(model, folder): no piece_ds is needed to load it.

Weights of Linear modules become a SHiRA adapter: fp32 differences at 2-D int32 positions. Every module has
r * (rows + columns) of them, with the same r. Source: peft/tuners/shira, read at 0.21.2. Norms are small: the adapter
holds them whole, as modules_to_save, so that they have the delta's bits.
"""

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import write_tensors
from piece_ds.deltas.delta import Change, Delta
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json


def export_peft(
    delta: Delta,
    output: Path | str,
    linear: set[str],
    base_model: str,
    small: Mapping[str, str] | None = None,
    read: Callable[[str], Tensor] | None = None,
) -> int:
    """Write adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained(model, output).

    A module's differences are padded to r * (rows + columns) with zeros at its first element. r is the smallest that
    serves all modules.

    Args:
        delta: to export.
        output: folder for both files.
        linear: parameters that are the weight of an nn.Linear.
        base_model: what the adapter's configuration names as its base.
        small: parameter -> its module, for modules such as norms that an adapter can hold whole.
        read: returns a parameter of the base; needed for those.
    Returns:
        How many selected values base + difference does not give to the bit. If a value crosses zero or changes by
        orders of magnitude, there may be no fp32 difference that leads from one to the other.
    Raises:
        UserError: no previous values, a selected element outside Linear weights and small modules, none in a Linear
            weight, or more of them than SHiRA can hold.
    """
    if not delta.reversible:
        raise UserError(f"delta {delta.path} has no previous values, which an adapter of differences needs")

    # PEFT can hold only weights of Linear modules, and only so many elements of each; and small modules whole.
    small = small or {}
    outside = [name for name in delta.shapes if name not in linear and name not in small]
    if outside:
        raise UserError(
            f"a PEFT adapter holds changes of Linear weights and norms alone, delta {delta.path} also changes "
            f"{len(outside)} other parameters, {outside[0]!r} for one: use piece_ds delta merge"
        )

    # SHiRA needs one r for all modules: the largest that any of them needs.
    changes = {name: delta.change(name) for name in delta.shapes if name in linear}
    if not changes:
        raise UserError(
            f"delta {delta.path} changes no Linear weight, which a PEFT adapter needs: use piece_ds delta merge"
        )
    rank = max(-(-change.index.numel() // sum(delta.shapes[name])) for name, change in changes.items())
    tight = [name for name in changes if rank * sum(delta.shapes[name]) > prod(delta.shapes[name])]
    if tight:
        raise UserError(
            f"SHiRA gives every module r * (rows + columns) elements, here r = {rank}, which is more than "
            f"{tight[0]!r} of shape {list(delta.shapes[tight[0]])} has: use piece_ds delta merge"
        )
    tensors: dict[str, Tensor] = {}
    num_inexact = 0
    for name, change in changes.items():
        rows_columns, weight, inexact = _shira(change, delta.shapes[name], rank)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.shira_indices"], tensors[f"{module}.shira_weight"] = rows_columns, weight
        num_inexact += inexact

    # Modules that are held whole: every parameter of theirs, changed or not.
    whole = sorted({small[name] for name in delta.shapes if name in small and name not in linear})
    for name, module in small.items():
        if module in whole:
            assert read is not None
            tensors[f"base_model.model.{name}"] = _changed(read(name), delta, name)

    # The configuration names the modules in the order of the file.
    output = Path(output)
    write_tensors(output / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(output / "adapter_config.json", _adapter_config(rank, list(changes), whole, base_model))
    return num_inexact


def _changed(base: Tensor, delta: Delta, name: str) -> Tensor:
    """Return a parameter of the base with the delta's values."""
    whole = base.clone().view(-1)
    if name in delta.shapes:
        change = delta.change(name)
        whole[change.index] = change.values
    return whole.view(base.shape)


def _shira(change: Change, shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor, int]:
    """Return one module's part of the adapter.

    Returns:
        Positions, int32 (2, r (m + n)); differences, fp32 (r (m + n)); and how many values they do not reproduce.
    """
    assert change.previous is not None
    length = rank * sum(shape)
    difference = (change.values.double() - change.previous.double()).float()
    # PEFT adds in fp32 and rounds: count where that misses the delta's value.
    reproduced = (change.previous.float() + difference).to(change.values.dtype)
    index = torch.zeros(length, dtype=torch.int64)
    weight = torch.zeros(length)
    index[: change.index.numel()], weight[: change.index.numel()] = change.index, difference
    positions = torch.stack([index // shape[1], index % shape[1]]).to(torch.int32)
    return positions, weight, int((reproduced != change.values).sum())


def _adapter_config(rank: int, names: list[str], whole: list[str], base_model: str) -> dict[str, object]:
    """Return what ShiraConfig.from_pretrained() needs.

    A mask_type other than 'random' makes PEFT take the positions from the file.
    """
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "mask_type": "precomputed",
        "target_modules": [name.removesuffix(".weight") for name in names],
        "modules_to_save": whole or None,
    }
