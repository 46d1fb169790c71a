"""mask.safetensors: which elements of which parameters are selected. Masks are exchanged in this format.

Version 1 holds packed bits per parameter. Bit j of byte i is flat row-major element 8 i + j; padding bits are zero.
Version 2 holds NAME.indices: ascending flat positions, int32, or int64 for parameters of 2**31 elements or more. Both
leave out parameters with nothing selected. This package reads both. A program that knows only version 1 refuses version
2.
"""

import logging
from collections.abc import Mapping
from math import isnan
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.checkpoint.artifact import MASK, Artifact, check_index, index_tensor, open_artifact, write_artifact
from piece_ds.checkpoint.metadata import describe, model_fingerprint
from piece_ds.runtime.distributed import all_reduce_sum_, barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError, nearest
from piece_ds.state.mask import Mask, collective_device
from piece_ds.state.partition import Layout

# Masks whose bits take no more bytes than this stay in version 1, which every program of the format reads: little
# would be saved. At a ratio of 0.001, indices take a thirtieth of the bits: 0.5 MB for 17 MB at 135 M weights.
BITS_ALWAYS_BELOW = 1 << 20

logger = logging.getLogger(__name__)

_INDICES = ".indices"


def save_mask(path: Path | str, mask: Mask, version: str | None = None) -> None:
    """Write a mask from all ranks' parts. A collective; rank 0 writes, and all return when the file is there.

    Args:
        path: of the file.
        mask: to write.
        version: "1" or "2". None takes 2 if bits need over a MiB and more bytes than indices. That is the case if fewer
            than one element in 32 is selected.
    """
    whole = mask.whole()
    if is_main():
        numel = {info.name: info.numel for info in mask.layout.parameters}
        version = version or _smaller(whole, numel)
        if version == "1":
            tensors = {name: ops.index_to_mask(index, numel[name]) for name, index in whole.items()}
        else:
            tensors = {f"{name}{_INDICES}": index_tensor(index, numel[name]) for name, index in whole.items()}
        base = {} if mask.base_fingerprint is None else {"base_fingerprint": mask.base_fingerprint}
        write_artifact(path, MASK, tensors, describe(mask, whole) | base, version)
    barrier()


def _smaller(whole: Mapping[str, Tensor], numel: Mapping[str, int]) -> str:
    """Return the version to write: the smaller one, except for small masks."""
    bits = sum((numel[name] + 7) // 8 for name in whole)
    indices = sum(index_tensor(index[:0], numel[name]).element_size() * index.numel() for name, index in whole.items())
    return "1" if bits <= max(BITS_ALWAYS_BELOW, indices) else "2"


def check_mask_file(path: Path | str, layout: Layout | None = None) -> dict[str, str]:
    """Read a mask file as far as needed to know that it is whole and, given a layout, fits the model.

    Args:
        path: of the file.
        layout: of the model; None checks only the file itself.
    Returns:
        Its metadata.
    Raises:
        UserError: the file is missing, truncated or of another format, its checksum or count is wrong, or it is of
            another model.
    """
    with open_artifact(path, MASK) as file:
        if layout is not None:
            _check_model(file, layout)
        known = layout.shapes() if layout is not None else {}
        count = 0
        for name in parameters_in(file):
            numel = int(torch.Size(known[name]).numel()) if layout is not None else file.metadata.numel(name)
            count += _check_parameter(file, name, numel)
        # An empty mask trains nothing: it is a mistake.
        stated = file.metadata.selected
        if count == 0 or stated not in (None, count):
            raise file.refuse(f"it selects {count} elements, its metadata says {stated}")
        return dict(file.strings)


def parameters_in(file: Artifact) -> list[str]:
    """Return the names of the parameters in an open mask file, in the file's order."""
    if file.strings["version"] == "1":
        return list(file.names)
    other = next((name for name in file.names if not name.endswith(_INDICES)), None)
    if other is not None:
        raise file.refuse(f"holds a tensor {other!r:.80}, expected names that end in {_INDICES!r}")
    return [name.removesuffix(_INDICES) for name in file.names]


def mask_names(path: Path | str) -> set[str]:
    """Return the names of the parameters that a mask file selects from. The file has been checked before."""
    with open_artifact(path, MASK, verify=False) as file:
        return set(parameters_in(file))


def whole_index(file: Artifact, name: str) -> Tensor:
    """Return the selected positions of one parameter of a checked mask file, ascending, int64."""
    if file.strings["version"] == "1":
        return ops.mask_to_index(file.tensor(name))
    return file.tensor(f"{name}{_INDICES}").long()


def load_mask(path: Path | str, layout: Layout) -> Mask:
    """Return this rank's part of a mask file, for any number of ranks. A collective.

    Raises:
        UserError: see check_mask_file().
    """

    # One rank reads the whole file and checks it; all learn the result.
    problem = broadcast_object(_problem(path, layout) if is_main() else None)
    if problem:
        raise UserError(problem)

    # Each rank reads only its own part.
    index = {}
    with open_artifact(path, MASK, verify=False) as file:
        present = set(parameters_in(file))
        for info in layout.parameters:
            if info.name not in present:
                continue
            part = layout.partition(info)
            positions = _positions(file, info.name, part.start, part.stop)
            if positions.numel():
                index[info.name] = positions
        metadata = file.metadata
    count = torch.tensor(sum(p.numel() for p in index.values()), device=collective_device())
    selected = int(all_reduce_sum_(count))
    ratio = _ratio(path, metadata.ratio, selected / layout.total)
    return Mask(layout, index, selected, metadata.method, ratio, base_fingerprint=metadata.base_fingerprint)


def _ratio(path: Path | str, stated: float, held: float) -> float:
    """Return the ratio that a mask's results may name: the one it states, unless the mask holds far more or less.

    The stated one is what was asked for. Less may have been eligible, and whole columns may not have fitted.
    """
    if isnan(stated) or stated / 2 <= held <= 2 * stated:
        return stated
    if is_main():
        logger.warning("mask %s selects %.3g of the model, not its metadata's ratio %.3g", path, held, stated)
    return held


def _problem(path: Path | str, layout: Layout) -> str | None:
    """Return what is wrong with a mask file; None if nothing is."""
    try:
        check_mask_file(path, layout)
    except UserError as error:
        return str(error)
    return None


def _positions(file: Artifact, name: str, start: int, stop: int) -> Tensor:
    """Return the selected positions in [start, stop) of one parameter, int64."""
    if file.strings["version"] == "1":
        # A part may begin inside a byte: read whole bytes, then drop what is outside.
        first_byte = start // 8
        found = ops.mask_to_index(file.part(name, first_byte, (stop + 7) // 8)) + 8 * first_byte
    else:
        found = file.tensor(f"{name}{_INDICES}").long()
    return found[(found >= start) & (found < stop)]


def _check_parameter(file: Artifact, name: str, numel: int | None) -> int:
    """Raise UserError unless one parameter's part of the file is valid; return its number of selected elements."""
    if file.strings["version"] != "1":
        index = file.tensor(f"{name}{_INDICES}")
        check_index(file, name, index, numel)
        return index.numel()
    bits = file.tensor(name)
    if bits.dtype != torch.uint8 or bits.dim() != 1:
        raise file.refuse(f"{name!r} is {bits.dtype} with {bits.dim()} dimensions, expected 1-D uint8")
    if numel is not None and bits.numel() != (numel + 7) // 8:
        raise file.refuse(
            f"{name!r} has {bits.numel()} bytes, a parameter of {numel} elements needs {(numel + 7) // 8}"
        )
    # The count would hide bits past the end, and the mask would select other elements than it says.
    if numel is not None and numel % 8 and int(bits[-1]) >> (numel % 8):
        raise file.refuse(f"{name!r} has bits set past its last element: it was packed for another shape")
    return int(np.bitwise_count(bits.numpy()).sum(dtype=np.int64))


def _check_model(file: Artifact, layout: Layout) -> None:
    """Raise UserError unless every parameter in the file is one of the model's, with the same shape."""
    known, shapes = layout.shapes(), file.metadata.shapes or {}
    for name in parameters_in(file):
        if name not in known:
            raise file.refuse(
                f"names parameter {name!r}, which this model does not have: it is a mask of another model"
                f"{nearest(name, list(known)) or '.'} Give the model it was made for"
            )
        shape = shapes.get(name, list(known[name]))
        # The fingerprint below would find this too, but cannot name the parameter.
        if shape != list(known[name]):
            raise file.refuse(
                f"{name!r} has shape {shape}, this model's is {list(known[name])}: it is a mask of another model"
            )
    if file.metadata.total not in (None, layout.total):
        raise file.refuse(
            f"was made for a model of {file.metadata.total} elements, this one has {layout.total}: it is a mask of "
            "another model"
        )
    found, own = file.metadata.model_fingerprint, model_fingerprint(layout)
    if found not in (None, own):
        raise file.refuse(
            f"was made for another model: parameter names or shapes differ (fingerprint {found[:12]}, this model's "
            f"{own[:12]})"
        )
