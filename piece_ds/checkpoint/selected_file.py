"""selected.safetensors: a checkpoint of the selected weights, for any number of ranks, ZeRO stage and offload.

For each parameter: NAME.indices, NAME.values (fp32 masters), NAME.exp_avg and NAME.exp_avg_sq (fp32): 16 bytes per
selected element. The metadata are those of a mask file, plus the optimizer's step and the engine's counters.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import SELECTED, open_artifact, write_artifact
from piece_ds.checkpoint.metadata import describe
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.zero.selected_state import MOMENTS, SelectedState

PARTS = ("values", *MOMENTS)


def save_selected_state(path: Path | str, mask: Mask, state: SelectedState) -> None:
    """Write the state of mask's elements, whole. A collective; rank 0 writes, all return when the file is there."""
    index = mask.whole()
    if is_main():
        sizes = [positions.numel() for positions in index.values()]
        tensors: dict[str, Tensor] = {f"{name}.indices": positions for name, positions in index.items()}
        for part in PARTS:
            # clone(): safetensors refuses tensors that share memory.
            pieces = zip(index, state.tensors[part].split(sizes), strict=True)
            tensors |= {f"{name}.{part}": piece.clone() for name, piece in pieces}
        metadata = {**describe(mask, index), "step": str(state.step), "counters": json.dumps(state.counters)}
        write_artifact(path, SELECTED, tensors, metadata)
    barrier()


def load_selected_state(path: Path | str, mask: Mask) -> SelectedState:
    """Return the state that save_selected_state() wrote for the same mask, on every rank. A collective.

    Raises:
        UserError: the file is missing, damaged, or of another mask.
    Memory: the file's size, on every rank.
    """
    index = mask.whole()
    with open_artifact(path, SELECTED) as file:
        tensors = {name: file.tensor(name) for name in file.names}
        step, counters = file.metadata.step, file.metadata.counters
        if step is None or counters is None:
            raise file.refuse("metadata 'step' or 'counters' is missing")
    # A file of another mask has other tensors, or other positions.
    if set(tensors) != {f"{name}.{part}" for name in index for part in ("indices", *PARTS)} or any(
        not torch.equal(tensors[f"{name}.indices"], positions) for name, positions in index.items()
    ):
        raise UserError(f"{path} is of another mask: its positions differ from the task's")
    # All values are fp32, whatever the model's dtype: masters and moments.
    expected = {f"{name}.{part}": (torch.float32, index[name].shape) for name in index for part in PARTS}
    wrong = next((name for name, like in expected.items() if (tensors[name].dtype, tensors[name].shape) != like), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong!r} is not as many fp32 values as its parameter has selected elements")
    parts = {part: torch.cat([tensors[f"{name}.{part}"] for name in index]) for part in PARTS}
    return SelectedState(parts, step, counters)
