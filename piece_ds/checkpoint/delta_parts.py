"""How a delta file holds its changes: the one place that writes and reads their tensors.

Version 1, the default: NAME.indices (int32, or int64), NAME.values, and NAME.previous and NAME.unscaled if there are.
Version 2 may differ in two ways, for each parameter by itself:

- NAME.gaps (uint8, see gaps.py) in place of NAME.indices, if it takes fewer bytes.
- NAME.values is left out if every value is +0, as in a delta that prunes. Metadata `zeros` (JSON: name -> dtype) names
  these parameters.

Version 3 is version 2 with NAME.packed (uint8, see packed_values.py) in place of NAME.values, NAME.previous and
NAME.unscaled. Metadata `packed` (JSON list) names the parts; values in `zeros` are left out of it too.

A program that knows only an earlier version refuses a later one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import DELTA, Artifact, check_index, index_tensor, write_artifact
from piece_ds.checkpoint.gaps import decode_gaps, encode_gaps
from piece_ds.checkpoint.packed_values import DTYPES, pack_values, unpack_values
from piece_ds.config.output_arguments import DELTA_CODINGS
from piece_ds.state.weights_hash import bits_of

CODINGS = tuple(DELTA_CODINGS)
INDICES, GAPS, VALUES, PREVIOUS, UNSCALED = "indices", "gaps", "values", "previous", "unscaled"
PACKED = "packed"
FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


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
        coding: 'indices' writes version 1. 'gaps' writes version 2 if anything in it takes fewer bytes. 'smallest'
            writes version 3 if the values take fewer bytes packed.
    Returns:
        The file's checksum.
    Raises:
        MachineError: the file cannot be written; an existing one is unchanged.
    """
    # Positions, and the values that must be stored.
    tensors: dict[str, Tensor] = {}
    stored: dict[str, dict[str, Tensor]] = {}
    zeros: dict[str, str] = {}
    for name, own in parts.items():
        key, positions = _positions(own[INDICES], numel[name], coding)
        tensors[f"{name}.{key}"] = positions
        stored[name] = {part: values for part, values in own.items() if part != INDICES}
        # +0 has no bit set; -0 and everything else must be stored.
        if coding != CODINGS[0] and not bool(bits_of(own[VALUES]).any()):
            zeros[name] = str(stored[name].pop(VALUES).dtype).removeprefix("torch.")

    # The values as they are, or packed.
    packed = _packed(stored) if coding == CODINGS[2] else None
    for name, values in stored.items():
        tensors |= {f"{name}.{part}": value for part, value in values.items()} if packed is None else packed[name]

    # The first version that has all of it.
    is_first = not zeros and not any(key.endswith(f".{GAPS}") for key in tensors)
    version = "3" if packed is not None else "1" if is_first else "2"
    strings = {key: value for key, value in metadata.items() if key not in ("zeros", PACKED)}
    strings |= {"zeros": json.dumps(zeros)} if zeros else {}
    if packed is not None:
        first = next(iter(parts.values()))
        strings[PACKED] = json.dumps([part for part in (VALUES, PREVIOUS, UNSCALED) if part in first])
    return write_artifact(path, DELTA, tensors, strings, version)


def parts_of(file: Artifact, names: Mapping[str, object]) -> tuple[str, ...] | None:
    """Return which parts every parameter of an open delta file has, positions aside; None if tensors are missing.

    Args:
        file: the open file.
        names: of the parameters that it must hold, and no others.
    """
    version, packed = file.strings["version"], file.metadata.packed
    if (packed is not None) != (version == "3"):
        return None
    if packed is not None:
        parts = tuple(packed)
        if parts not in ((VALUES,), (VALUES, PREVIOUS), (VALUES, PREVIOUS, UNSCALED)):
            return None
    else:
        has = {part: any(key.endswith(f".{part}") for key in file.names) for part in (PREVIOUS, UNSCALED)}
        parts = (VALUES, *(part for part, is_there in has.items() if is_there))
    zeros, present = file.metadata.zeros or {}, set(file.names)

    # Whatever is not taken away here was not expected.
    for name in names:
        positions = {f"{name}.{INDICES}", f"{name}.{GAPS}"} & present
        stored = {f"{name}.{part}" for part in _stored(parts, name in zeros)}
        if packed is not None:
            stored = {f"{name}.{PACKED}"} if stored else set()
        if len(positions) != 1 or not stored <= present:
            return None
        present -= positions | stored
    is_first = version == "1"
    if present or set(zeros) - set(names) or (is_first and (zeros or any(key.endswith(GAPS) for key in file.names))):
        return None
    return parts


def read_change(file: Artifact, name: str, numel: int | None, parts: Sequence[str]) -> dict[str, Tensor]:
    """Return the positions and some parts of one parameter.

    Args:
        file: an open file of positions and parts: a delta, or selected values.
        name: of the parameter.
        numel: its elements; None if the file does not say.
        parts: wanted: some of 'values', 'previous' and 'unscaled'.
    Returns:
        'indices' (ascending, int64) and every wanted part, in the parameter's dtype.
    Raises:
        UserError: they cannot be read, or do not fit the parameter.
    """
    zeros, packed = file.metadata.zeros or {}, file.metadata.packed

    # Parts that stand as they are. Whatever is stored says how many positions there must be.
    found = {}
    if packed is None:
        found = {part: file.tensor(f"{name}.{part}") for part in _stored(parts, name in zeros)}
    count = next((values.numel() for values in found.values()), None)
    found[INDICES] = index = read_index(file, name, numel, count)

    # Packed parts: all of a parameter's stand in one stream.
    if packed is not None and (stored := _stored(packed, name in zeros)):
        try:
            found |= unpack_values(file.tensor(f"{name}.{PACKED}"), stored, index.numel())
        except ValueError as error:
            raise file.refuse(f"packed values of {name!r} are damaged: {error}") from None
    if VALUES in parts and name in zeros:
        found[VALUES] = _zeros(file, name, index.numel())
    return {part: found[part] for part in (INDICES, *parts)}


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


def _zeros(file: Artifact, name: str, count: int) -> Tensor:
    """Return the values of a parameter that are left out because all are zero."""
    dtype = (file.metadata.zeros or {})[name]
    if dtype not in FLOATS:
        raise file.refuse(f"zeros of {name!r} are {dtype[:60]!r}, expected one of {', '.join(FLOATS)}")
    return torch.zeros(count, dtype=FLOATS[dtype])


def _stored(parts: Sequence[str], is_zero: bool) -> list[str]:
    """Return the parts that a file holds of one parameter."""
    return [part for part in parts if not (part == VALUES and is_zero)]


def _packed(stored: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]] | None:
    """Return parameter name -> {tensor name: packed parts}; None if that takes no fewer bytes, or nothing is stored."""
    packed = {name: {f"{name}.{PACKED}": pack_values(own)} if own else {} for name, own in stored.items()}
    plain = sum(part.numel() * part.element_size() for own in stored.values() for part in own.values())
    return packed if sum(stream.numel() for own in packed.values() for stream in own.values()) < plain else None


def _positions(index: Tensor, numel: int, coding: str) -> tuple[str, Tensor]:
    """Return the part's name and its tensor, the smaller one."""
    plain = index_tensor(index, numel)
    if coding == CODINGS[0]:
        return INDICES, plain
    coded = encode_gaps(index)
    return (GAPS, coded) if coded.numel() < plain.numel() * plain.element_size() else (INDICES, plain)
