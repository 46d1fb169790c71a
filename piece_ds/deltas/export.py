"""Write a delta in the formats of other tools: vLLM's sparse weight patches, and a PEFT adapter.

vLLM takes patches in checkpoint coordinates: tensor name, full shape, 1-D int32 flat indices, and replacement values in
the tensor's dtype. NaN means "unchanged". We add the previous values, if there are, so that the base can be checked and
the patch taken off again. Source: vllm/distributed/weight_transfer/sparse_nccl_engine.py and
model_executor/model_loader/checkpoint_weight_patch.py; pull requests 40096, 50723, 53751 of vllm-project/vllm, 2026.

PEFT's SHiRA adds fp32 differences at 2-D int32 positions to the weights of Linear modules. Every module has r * (rows +
columns) of them, with the same r. Source: peft/tuners/shira, read at 0.21.2.
"""

import json
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import write_tensors
from piece_ds.deltas.delta import Change, Delta
from piece_ds.deltas.folder import ModelFolder
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.state.partition import INT32_MAX


def export_vllm(delta: Delta, output: Path | str, folder: ModelFolder | None = None) -> None:
    """Write NAME.indices (int32), NAME.values and metadata `full_shapes` (JSON): the fields of SparseWeightPatch.

    And NAME.previous, if the delta has previous values.

    Args:
        delta: to export.
        output: path of the file.
        folder: the checkpoint that vLLM serves, for its names and for experts that it holds in parts; without it every
            tensor is whole and has its parameter's name.
    Raises:
        UserError: a value is NaN, or a tensor has more elements than int32 can count.
    """
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for parameter, shape in delta.shapes.items():
        change = delta.change(parameter)
        if bool(change.values.isnan().any()):
            raise UserError(f"delta {delta.path} holds NaN in {parameter!r}, which vLLM reads as 'unchanged'")
        everything = torch.arange(change.index.numel())
        whole = [(parameter, everything, change.index)]
        for name, places, positions in whole if folder is None else folder.split(parameter, change.index):
            shapes[name] = list(shape if folder is None else folder.stored[name].shape)
            if prod(shapes[name]) > INT32_MAX:
                raise UserError(f"vLLM's patches have int32 indices, {name!r} has {prod(shapes[name])} elements")
            tensors[f"{name}.indices"] = positions.to(torch.int32)
            tensors[f"{name}.values"] = change.values[places]
            if change.previous is not None:
                tensors[f"{name}.previous"] = change.previous[places]
    metadata = {"format": "vllm-sparse-weight-patch", "full_shapes": json.dumps(shapes)}
    for key in ("base_fingerprint", "result_fingerprint"):
        if key in delta.metadata:
            metadata[key] = delta.metadata[key]
    write_tensors(output, tensors, metadata)


def require_stored_names(delta: Delta) -> None:
    """Raise UserError if the delta's parameter names may differ from those in checkpoints.

    While it loads, transformers stacks experts and renames parts of vision-language models. A patch under such a
    parameter's own name would fit no checkpoint. Only the model knows the stored names.
    """
    for name, shape in delta.shapes.items():
        # Names tell what transformers changes while it loads.
        parts = name.split(".")
        stacked = "experts" in parts and (len(shape) > 2 or parts[-1] not in ("weight", "bias"))
        renamed = bool({"language_model", "visual", "vision_tower", "vision_model"} & set(parts))
        if stacked or renamed or parts[-1] not in ("weight", "bias"):
            raise UserError(
                f"delta {delta.path} changes {name!r}, which checkpoints may hold under other names or in parts: add "
                "--model, the folder that is served"
            )


def export_peft(delta: Delta, output: Path | str, linear: set[str], base_model: str) -> int:
    """Write adapter_config.json and adapter_model.safetensors, for PeftModel.from_pretrained(model, output).

    A module's differences are padded to r * (rows + columns) with zeros at its first element. r is the smallest that
    serves all modules.

    Args:
        delta: to export.
        output: folder for both files.
        linear: parameters that are the weight of an nn.Linear.
        base_model: what the adapter's configuration names as its base.
    Returns:
        How many selected values base + difference does not give to the bit. If a value crosses zero or changes by
        orders of magnitude, there may be no fp32 difference that leads from one to the other.
    Raises:
        UserError: no previous values, a selected element outside Linear weights, or more of them than SHiRA can hold.
    """
    if not delta.reversible:
        raise UserError(f"delta {delta.path} has no previous values, which an adapter of differences needs")

    # PEFT can hold only weights of Linear modules, and only so many elements of each.
    outside = [name for name in delta.shapes if name not in linear]
    if outside:
        raise UserError(
            f"a PEFT adapter holds changes of Linear weights alone, delta {delta.path} also changes "
            f"{len(outside)} other parameters, {outside[0]!r} for one: use piece_ds delta merge"
        )

    # SHiRA needs one r for all modules: the largest that any of them needs.
    changes = {name: delta.change(name) for name in delta.shapes}
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

    # The configuration names the modules in the order of the file.
    output = Path(output)
    write_tensors(output / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(output / "adapter_config.json", _adapter_config(rank, list(changes), base_model))
    return num_inexact


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


def _adapter_config(rank: int, names: list[str], base_model: str) -> dict[str, object]:
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
    }
