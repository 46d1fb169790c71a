"""mask.safetensors: per parameter with a selected element, packed bits; what masks are exchanged as.

Bit j of byte i is flat row-major element 8 i + j; padding bits are zero. Metadata: format, version, method, ratio,
selected, total, shapes (JSON), model_fingerprint, checksum. The last two are checked when present.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from piece_ds import ops
from piece_ds.checkpoint.metadata import VERSION, checksum, describe, model_fingerprint
from piece_ds.runtime.distributed import all_reduce_sum_, barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.runtime.files import write_whole
from piece_ds.state.mask import Mask, collective_device
from piece_ds.state.partition import Layout


def save_mask(path: Path | str, mask: Mask) -> None:
    """Write a mask from all ranks' shares. A collective; rank 0 writes, and all return when the file is there."""
    whole = mask.whole()
    if is_main():
        numel = {info.name: info.numel for info in mask.layout.parameters}
        tensors = {name: ops.index_to_mask(index, numel[name]) for name, index in whole.items()}
        metadata = describe("piece-mask", mask, set(whole), tensors)
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))
    barrier()


def check_mask_file(path: Path | str, layout: Layout | None = None) -> dict[str, str]:
    """Read a mask file as far as needed to know that it is whole and, given a layout, fits the model.

    Returns:
        Its metadata.
    Raises:
        UserError: missing, truncated, of another format, checksum or count wrong, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--mask_file {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"mask {path} cannot be read as a safetensors file ({error}): it is truncated or damaged; write it again"
        ) from error
    if metadata.get("format") != "piece-mask" or metadata.get("version") != VERSION:
        raise UserError(
            f"mask {path} has format {metadata.get('format')!r} version {metadata.get('version')!r}, "
            "expected 'piece-mask' version '1'"
        )
    if "checksum" in metadata and metadata["checksum"] != checksum(tensors):
        raise UserError(f"mask {path} is damaged: its checksum does not match its content; write it again")
    shapes = _shapes(path, metadata)
    _ratio(path, metadata)
    for name, bits in tensors.items():
        _check_bits(path, name, bits, shapes.get(name))
    count = sum(int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64)) for bits in tensors.values())
    if str(count) != metadata.get("selected", str(count)) or count == 0:
        raise UserError(f"mask {path} selects {count} elements, its metadata says {metadata.get('selected')}")
    if layout is not None:
        _check_fits(path, metadata, tensors, layout)
    return metadata


def _shapes(path: Path, metadata: dict[str, str]) -> dict[str, list[int]]:
    try:
        shapes = json.loads(metadata.get("shapes", "{}"))
    except json.JSONDecodeError as error:
        raise UserError(f"mask {path}: metadata 'shapes' is not JSON ({error})") from error
    if not isinstance(shapes, dict):
        raise UserError(f"mask {path}: metadata 'shapes' must map names to shapes, got {type(shapes).__name__}")
    return shapes


def _ratio(path: Path | str, metadata: dict[str, str]) -> float:
    try:
        return float(metadata.get("ratio", "nan"))
    except ValueError:
        raise UserError(f"mask {path}: metadata 'ratio' is {metadata['ratio'][:40]!r}, expected a number") from None


def _check_bits(path: Path, name: str, bits: Tensor, shape: list[int] | None) -> None:
    if bits.dtype != torch.uint8 or bits.dim() != 1:
        raise UserError(f"mask {path}: {name!r} is {bits.dtype} with {bits.dim()} dimensions, expected 1-D uint8")
    if shape is None:
        return
    numel = int(torch.Size(shape).numel())
    if bits.numel() != (numel + 7) // 8:
        raise UserError(f"mask {path}: {name!r} has {bits.numel()} bytes, shape {shape} needs {(numel + 7) // 8}")
    if numel % 8 and int(bits[-1]) >> (numel % 8):
        raise UserError(f"mask {path}: {name!r} has bits set past its last element: it was packed for another shape")


def _check_fits(path: Path, metadata: dict[str, str], tensors: dict[str, Tensor], layout: Layout) -> None:
    known = layout.shapes()
    shapes = _shapes(path, metadata)
    for name, bits in tensors.items():
        if name not in known:
            raise UserError(
                f"mask {path} names parameter {name!r}, which this model does not have: it is a mask of "
                f"another model.{nearest(name, list(known))}"
            )
        shape = shapes.get(name, list(known[name]))
        if list(shape) != list(known[name]):
            raise UserError(
                f"mask {path}: {name!r} has shape {list(shape)}, this model's is {list(known[name])}: "
                "it is a mask of another model"
            )
        _check_bits(path, name, bits, list(known[name]))
    fingerprint = metadata.get("model_fingerprint")
    if fingerprint is not None and fingerprint != model_fingerprint(layout):
        raise UserError(
            f"mask {path} was made for another model: parameter names or shapes differ "
            f"(fingerprint {fingerprint[:12]}, this model's {model_fingerprint(layout)[:12]})"
        )


def _checked(path: Path | str, layout: Layout) -> tuple[str | None, dict[str, str]]:
    """(what is wrong or None, metadata): one rank reads the whole file, and all learn what it found."""
    try:
        return None, check_mask_file(path, layout)
    except UserError as error:
        return str(error), {}


def load_mask(path: Path | str, layout: Layout) -> Mask:
    """This rank's share of a mask file, for any number of ranks. A collective.

    Raises:
        UserError: see check_mask_file.
    """
    problem, metadata = broadcast_object(_checked(path, layout) if is_main() else None)
    if problem:
        raise UserError(problem)
    index = {}
    with safe_open(path, framework="pt") as file:
        for info in layout.parameters:
            if info.name not in file.keys():  # noqa: SIM118 - not a dict
                continue
            part = layout.partition(info)
            first_byte = part.start // 8
            bits = file.get_slice(info.name)[first_byte : (part.stop + 7) // 8]
            positions = ops.mask_to_index(bits) + 8 * first_byte
            positions = positions[(positions >= part.start) & (positions < part.stop)]
            if positions.numel():
                index[info.name] = positions
    count = torch.tensor(sum(p.numel() for p in index.values()), device=collective_device())
    method, ratio = metadata.get("method", "unknown"), _ratio(path, metadata)
    return Mask(layout, index, int(all_reduce_sum_(count)), method, ratio)
