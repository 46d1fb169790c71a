"""selected.safetensors: a checkpoint of the selected weights for any number of ranks, ZeRO stage and offload.

Per parameter NAME.indices, NAME.values (fp32 masters), NAME.exp_avg and NAME.exp_avg_sq (fp32): 16 bytes a selected
element. Metadata as in a mask file, and the optimizer's step and the engine's counters.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from piece_ds.checkpoint.metadata import VERSION, checksum, describe
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_whole
from piece_ds.state.mask import Mask
from piece_ds.zero.selected_state import MOMENTS, SelectedState

FORMAT = "piece-selected"
PARTS = ("values", *MOMENTS)


def save_selected_state(path: Path | str, mask: Mask, state: SelectedState) -> None:
    """Write the state of mask's elements, whole. A collective; rank 0 writes, all return when the file is there."""
    index = mask.whole()
    if is_main():
        sizes = [positions.numel() for positions in index.values()]
        tensors: dict[str, Tensor] = {f"{name}.indices": positions for name, positions in index.items()}
        for part in PARTS:
            pieces = zip(index, state.tensors[part].split(sizes), strict=True)
            tensors |= {f"{name}.{part}": piece.clone() for name, piece in pieces}
        metadata = describe(FORMAT, mask, set(index), tensors)
        metadata |= {"step": str(state.step), "counters": json.dumps(state.counters)}
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))
    barrier()


def load_selected_state(path: Path | str, mask: Mask) -> SelectedState:
    """The state that save_selected_state() wrote for the same mask, on every rank. A collective.

    Raises:
        UserError: missing, damaged, or of another mask.
    Memory: the file's size, on every rank.
    """
    index = mask.whole()
    tensors, metadata = _read(Path(path))
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise UserError(
            f"{path} has format {metadata.get('format')!r} version {metadata.get('version')!r}, expected "
            f"{FORMAT!r} version {VERSION!r}"
        )
    if metadata.get("checksum") != checksum(tensors):
        raise UserError(f"{path} is damaged: its checksum does not match its content")
    if set(tensors) != {f"{name}.{part}" for name in index for part in ("indices", *PARTS)} or any(
        not torch.equal(tensors[f"{name}.indices"], positions) for name, positions in index.items()
    ):
        raise UserError(f"{path} is of another mask: its positions differ from the task's")
    parts = {part: torch.cat([tensors[f"{name}.{part}"] for name in index]) for part in PARTS}
    return SelectedState(parts, *_counters(Path(path), metadata))


def _counters(path: Path, metadata: dict[str, str]) -> tuple[int, dict[str, float]]:
    """The optimizer's step, and the counters of the engine and its loss scaler."""
    try:
        step, counters = int(metadata["step"]), json.loads(metadata["counters"])
        return step, {str(name): float(value) for name, value in counters.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: metadata 'step' or 'counters' cannot be read ({error!r}): it is damaged") from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): it is missing or damaged") from error
