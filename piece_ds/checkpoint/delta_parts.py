"""How a delta file holds its changes: the one place that writes and reads their tensors.

Version 1, the default: NAME.indices (int32, or int64), NAME.values, and NAME.previous and NAME.unscaled if there are.
Version 2 may differ in two ways, for each parameter by itself:

- NAME.gaps (uint8, see gaps.py) in place of NAME.indices, if it takes fewer bytes.
- NAME.values is left out if every value is +0, as in a delta that prunes. Metadata `zeros` (JSON: name -> dtype) names
  these parameters.

A program that knows only version 1 refuses version 2.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import DELTA, Artifact, check_index, index_tensor, write_artifact
from piece_ds.checkpoint.gaps import decode_gaps, encode_gaps
from piece_ds.state.weights_hash import bits_of

CODINGS = ("indices", "smallest")
INDICES, GAPS, VALUES, PREVIOUS, UNSCALED = "indices", "gaps", "values", "previous", "unscaled"
FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_parts(
    path: Path | str,
    parts: Mapping[str, Mapping[str, Tensor]],
    numel: Mapping[str, int],
    metadata: Mapping[str, str],
    coding: str = CODINGS[0],
) -> str:
    """Write a delta file, whole.

    Args:
        path: of the file.
        parts: parameter name -> 'indices' (ascending, int64), 'values' and, if they are kept, 'previous' and
            'unscaled'; on the CPU.
        numel: elements of at least these parameters.
        metadata: without format, version and checksum.
        coding: 'indices' writes version 1. 'smallest' writes version 2 if anything in it takes fewer bytes.
    Returns:
        The file's checksum.
    Raises:
        MachineError: the file cannot be written; an existing one is unchanged.
    """
    tensors: dict[str, Tensor] = {}
    zeros: dict[str, str] = {}
    for name, own in parts.items():
        tensors |= {f"{name}.{part}": values for part, values in own.items() if part != INDICES}
        key, positions = _positions(own[INDICES], numel[name], coding)
        tensors[f"{name}.{key}"] = positions
        # +0 has no bit set; -0 and everything else must be stored.
        if coding == CODINGS[1] and not bool(bits_of(own[VALUES]).any()):
            zeros[name] = str(tensors.pop(f"{name}.{VALUES}").dtype).removeprefix("torch.")
    is_first = not zeros and not any(key.endswith(f".{GAPS}") for key in tensors)
    strings = {key: value for key, value in metadata.items() if key != "zeros"}
    strings |= {"zeros": json.dumps(zeros)} if zeros else {}
    return write_artifact(path, DELTA, tensors, strings, "1" if is_first else "2")


def parts_of(file: Artifact, names: Mapping[str, object]) -> tuple[str, ...] | None:
    """Return which parts every parameter of an open delta file has, positions aside; None if tensors are missing.

    Args:
        file: the open file.
        names: of the parameters that it must hold, and no others.
    """
    has = {part: any(key.endswith(f".{part}") for key in file.names) for part in (PREVIOUS, UNSCALED)}
    parts = (VALUES, *(part for part, is_there in has.items() if is_there))
    zeros, present = file.metadata.zeros or {}, set(file.names)

    # Whatever is not taken away here was not expected.
    for name in names:
        positions = {f"{name}.{INDICES}", f"{name}.{GAPS}"} & present
        stored = {f"{name}.{part}" for part in parts if not (part == VALUES and name in zeros)}
        if len(positions) != 1 or not stored <= present:
            return None
        present -= positions | stored
    is_first = file.strings["version"] == "1"
    if present or set(zeros) - set(names) or (is_first and (zeros or any(key.endswith(GAPS) for key in file.names))):
        return None
    return parts


def read_index(file: Artifact, name: str, numel: int | None, count: int | None = None) -> Tensor:
    """Return the positions of one parameter, ascending, int64.

    Args:
        file: an open delta file.
        name: of the parameter.
        numel: its elements; None if the file does not say.
        count: how many positions there must be; None takes the file's own word.
    Raises:
        UserError: the positions are damaged, or do not fit the parameter.
    """
    if f"{name}.{GAPS}" not in file.names:
        index = file.tensor(f"{name}.{INDICES}")
        check_index(file, name, index, numel)
        return index.long()
    try:
        return decode_gaps(file.tensor(f"{name}.{GAPS}"), count, 2**63 - 1 if numel is None else numel)
    except ValueError as error:
        raise file.refuse(f"gaps of {name!r} are damaged: {error}") from None


def read_values(file: Artifact, name: str, count: int | None = None) -> Tensor:
    """Return the values of one parameter, in its dtype.

    Args:
        file: an open delta file.
        name: of the parameter.
        count: how many there are, for values that are left out because all are zero.
    Raises:
        UserError: they cannot be read.
    """
    dtype = (file.metadata.zeros or {}).get(name)
    if dtype is None:
        return file.tensor(f"{name}.{VALUES}")
    if dtype not in FLOATS:
        raise file.refuse(f"zeros of {name!r} are {dtype[:60]!r}, expected one of {', '.join(FLOATS)}")
    return torch.zeros(count or 0, dtype=FLOATS[dtype])


def _positions(index: Tensor, numel: int, coding: str) -> tuple[str, Tensor]:
    """Return the part's name and its tensor, the smaller one."""
    plain = index_tensor(index, numel)
    if coding == CODINGS[0]:
        return INDICES, plain
    coded = encode_gaps(index)
    return (GAPS, coded) if coded.numel() < plain.numel() * plain.element_size() else (INDICES, plain)
