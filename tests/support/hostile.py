"""Files that keep their structure and say something that cannot be: mutations of JSON trees and safetensors files.

Random bytes seldom get past a header. These are well-formed, with checksums made for what they hold, so that they reach
the checks behind.
"""

import copy
import hashlib
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

LONG_NUMBER, DEEP = "<5000 digits>", "<deep>"  # written into the text afterwards

VALUES: list[Any] = [
    None, True, False, 0, -1, 1.5, -0.0, 2**31, 2**63, 2**64, -(2**63) - 1, 1e300, float("inf"), float("-inf"),
    float("nan"), LONG_NUMBER, DEEP, "", "x", "1", "nan", "1e999", "../../outside", "/etc/passwd", "a\0b", "\ud800",
    "9" * 5000, "x" * 100_000, [], [[]], [None], ["x"], [0], {}, {"": None}, {"x": {"y": []}},
]  # fmt: skip


def text_of(tree: Any) -> bytes:
    """tree as JSON, with its placeholders written out."""
    text = json.dumps(tree)
    return text.replace(f'"{LONG_NUMBER}"', "7" * 5000).replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).encode()


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every node below the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated_tree(tree: Any, rng: random.Random) -> Any:
    """A copy of a JSON tree with one to three nodes replaced, removed, renamed or repeated."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        found = list(places(tree))
        if not found:
            return copy.deepcopy(rng.choice(VALUES))
        *path, key = rng.choice(found)
        parent = tree
        for step in path:
            parent = parent[step]
        kind = rng.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "", "a.b", "../x", "x" * 300])] = parent.pop(key)
        elif kind == 2 and isinstance(parent, list):
            parent.extend(copy.deepcopy(parent[:3]))
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return tree


def mutated_tensors(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file with its metadata, its header or its tensors changed; a checksum is made again or left out."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    metadata = header.get("__metadata__", {})
    kind = rng.randrange(4)
    if kind == 0 and metadata:
        _change_metadata(metadata, rng)
    elif kind == 1:
        header = _change_tensor(header, data, rng)
    elif kind == 2:
        header = mutated_tree(header, rng)
    else:
        for _ in range(rng.randint(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.choice([0, 1, 127, 128, 255])
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict) and rng.random() < 0.9:
        _renew_checksum(header, bytes(data))
    text = text_of(header)
    return struct.pack("<Q", len(text)) + text + bytes(data)


def _change_metadata(metadata: dict[str, str], rng: random.Random) -> None:
    key = rng.choice(list(metadata))
    try:
        inner = json.loads(metadata[key])
    except ValueError:
        inner = None
    if isinstance(inner, dict) and rng.random() < 0.7:
        metadata[key] = text_of(mutated_tree(inner, rng)).decode()
    else:
        metadata[key] = rng.choice(
            [
                "",
                "-1",
                "1.5",
                "nan",
                "inf",
                "1e999",
                "9" * 5000,
                str(2**63),
                str(2**64),
                "x",
                "[]",
                "{}",
                "null",
                "[" * 5000,
            ]
        )


def _change_tensor(header: dict[str, Any], data: bytearray, rng: random.Random) -> dict[str, Any]:
    """Another dtype, shape or sorting of one tensor, offsets kept right."""
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return header
    entry = header[rng.choice(names)]
    begin, end = entry["data_offsets"]
    size, kind = end - begin, rng.randrange(4)
    if kind == 0:
        dtypes = {"I64": 8, "F64": 8, "I32": 4, "F32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "BOOL": 1,
                  "F8_E4M3": 1, "C64": 8}  # fmt: skip
        entry["dtype"] = rng.choice([dtype for dtype, width in dtypes.items() if size % width == 0])
        width = dtypes[entry["dtype"]]
        entry["shape"] = [size // width]
    elif kind == 1:
        numel = int(np.prod(entry["shape"]))
        entry["shape"] = rng.choice(
            [[1, numel], [numel, 1], [numel, 1, 1], [1, 1, numel], [] if numel == 1 else [numel, 1]]
        )
    elif kind == 2:
        data[begin:end] = data[begin:end][::-1]
    else:
        data[begin:end] = bytes([rng.choice([0, 255])]) * size
    return header


def _renew_checksum(header: dict[str, Any], data: bytes) -> None:
    digest = hashlib.sha256()
    for name in sorted(name for name in header if name != "__metadata__"):
        try:
            begin, end = header[name]["data_offsets"]
            digest.update(name.encode(errors="replace") + data[begin:end])
        except (TypeError, ValueError, KeyError):
            pass
    header["__metadata__"]["checksum"] = digest.hexdigest()
