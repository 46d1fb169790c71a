"""What the safetensors files of a model folder hold. Only headers are read; weights are read only to compare two."""

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from piece_ds.runtime.errors import UserError

WHOLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"

# safetensors' names of the dtypes that a model can train in. The others hold quantized weights and indices.
FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_OTHER_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NUMBER = re.compile(r"\.\d+(?=\.)")
_MOST_NAMED = 3  # tensors in a message
# Rows compared at a time. Two embeddings of a large vocabulary need not fit into memory at once.
_ROWS = 4096


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, as the header of its file describes it.

    Attributes:
        path: file that holds it.
        shape: of the tensor.
        dtype: as safetensors names it, such as "BF16".
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def empty(self) -> Tensor:
        """Return a tensor of this shape and dtype on the meta device. An unknown dtype becomes uint8."""
        dtype = FLOAT_DTYPES.get(self.dtype) or _OTHER_DTYPES.get(self.dtype) or torch.uint8
        return torch.empty(self.shape, dtype=dtype, device="meta")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return name -> stored tensor of the safetensors files that transformers would load; empty if there are none.

    Args:
        folder: a model folder.
    Raises:
        UserError: a shard is missing, a file is damaged, or a tensor is not in the file that the index names.
    Cost: reads headers only.
    """
    if (folder / WHOLE_NAME).is_file():  # wins over an index, as in transformers
        return _required(_headers(folder / WHOLE_NAME), folder / WHOLE_NAME)
    if not (folder / INDEX_NAME).is_file():
        return {}
    # The index and the shards may come from different downloads: each name is looked up.
    where = _weight_map(folder / INDEX_NAME)
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing, which {INDEX_NAME} names: fetch the checkpoint again")
        found |= _headers(folder / file)
    # transformers would fill these with random numbers and only warn.
    absent = sorted(where.keys() - found.keys())
    if absent:
        raise UserError(
            f"{folder / where[absent[0]]} does not hold {absent[0]!r}, though {INDEX_NAME} says so "
            f"({len(absent)} such tensors): fetch the checkpoint again"
        )
    return found


def _required(found: dict[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    if not found:
        raise UserError(f"{path} holds no tensor: fetch the checkpoint again")
    return found


def require_weight_files(source: str, folder: Path) -> None:
    """Raise UserError unless folder holds weights that transformers would load.

    Pickled weights with an index count only if every file that the index names is there.
    """
    if (folder / WHOLE_NAME).is_file() or (folder / INDEX_NAME).is_file() or (folder / "pytorch_model.bin").is_file():
        return
    index = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        raise UserError(f"{source}: the folder holds no weights ({WHOLE_NAME}, {INDEX_NAME} or pytorch_model.bin)")
    for file in sorted(set(_weight_map(index).values())):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing, which {index.name} names: fetch the checkpoint again")


def _weight_map(path: Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        is_map = isinstance(where, dict) and all(isinstance(file, str) for file in where.values())
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    # A name with a folder in it ("../x") would make us read a file that is not the model's.
    outside = [] if not is_map else [file for file in where.values() if Path(file).name != file]
    if not is_map or outside:
        what = f"names {outside[0]!r}, outside the folder" if outside else "has no weight_map of tensor to file"
        raise UserError(f"{path} {what}: fetch the checkpoint again")
    return where


def _headers(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {name: StoredTensor(path, tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({str(error).strip().splitlines()[0]}): fetch it again") from None


def main_dtype(stored: dict[str, StoredTensor]) -> torch.dtype | None:
    """Return the floating dtype of most stored elements; None if no tensor is floating. The wider dtype wins a tie."""
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        if tensor.dtype in FLOAT_DTYPES:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel
    if not sizes:
        return None
    return FLOAT_DTYPES[max(sizes, key=lambda name: (sizes[name], FLOAT_DTYPES[name].itemsize))]


def hold_the_same(one: tuple[str, StoredTensor], other: tuple[str, StoredTensor]) -> bool:
    """Return whether two stored tensors have the same shape, dtype and bits.

    Args:
        one: name in its file, and the tensor.
        other: likewise.
    Cost: reads both tensors, 4096 rows at a time.
    """
    (name, first), (other_name, second) = one, other
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    with safe_open(first.path, framework="pt") as file, safe_open(second.path, framework="pt") as other_file:
        a, b = file.get_slice(name), other_file.get_slice(other_name)
        # In parts: both tensors whole would need twice the memory of an embedding.
        starts = range(0, first.shape[0], _ROWS) if first.shape else range(1)
        parts = [slice(start, start + _ROWS) if first.shape else ... for start in starts]
        return all(torch.equal(_bits(a[part]), _bits(b[part])) for part in parts)


def _bits(tensor: Tensor) -> Tensor:
    # As bytes, a NaN equals itself and 0.0 differs from -0.0.
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)


def refuse_incomplete(source: str, model: nn.Module, info: dict[str, Any]) -> None:
    """Raise UserError if transformers' loading report names missing or mismatched parameters.

    Args:
        source: what was loaded, for the message.
        model: the loaded model. Tensors of layers that it does not have are refused too.
        info: from from_pretrained(output_loading_info=True); names of buffers in it are ignored.
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    # Entries are names, or tuples of name and shapes, by the release of transformers.
    mismatched = sorted(entry if isinstance(entry, str) else entry[0] for entry in info.get("mismatched_keys", ()))
    missing = sorted(params.keys() & set(info.get("missing_keys", ())) - set(mismatched))
    if mismatched:
        raise UserError(
            f"{source}: the files hold {_named(mismatched)} in another shape than config.json asks for: they belong "
            "to another model; fetch config.json and weights together"
        )
    # Layers that config.json leaves out. Names that the model's class knows to ignore are not in the report.
    shapes_of_names = {_NUMBER.sub(".*", name) for name in params}
    beyond = sorted(
        name
        for name in set(info.get("unexpected_keys") or ()) - params.keys()
        if _NUMBER.sub(".*", name) in shapes_of_names
    )
    if beyond and not missing:
        raise UserError(
            f"{source}: the files hold {_named(beyond)}, which config.json leaves out: they belong to a larger model; "
            "fetch config.json and weights together, or save the smaller model by itself"
        )
    if missing:
        raise UserError(
            f"{source}: the files lack {_named(missing)}, which would be random numbers: the checkpoint is not whole, "
            f"or not of {type(model).__name__}"
        )


def _named(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more tensors"
