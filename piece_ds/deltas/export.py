"""Write a delta as vLLM's sparse weight patches. For PEFT see export_peft.py.

vLLM takes patches in checkpoint coordinates: tensor name, full shape, 1-D int32 flat indices, and replacement values in
the tensor's dtype. NaN means "unchanged". We add the previous values, if there are, so that the base can be checked and
the patch taken off again. Source: vllm/distributed/weight_transfer/sparse_nccl_engine.py and
model_executor/model_loader/checkpoint_weight_patch.py; pull requests 40096, 50723, 53751 of vllm-project/vllm, 2026.
"""

import json
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import write_tensors
from piece_ds.deltas.delta import Delta
from piece_ds.deltas.folder import ModelFolder
from piece_ds.runtime.errors import UserError
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
