"""Values of a delta in few bytes, to the bit: 2.3 an entry in bf16 with the previous value, for 4 of plain numbers.

Training moves most values by a few places. So each part is stored as its distance from the part before it, counted in
representable numbers: previous values as their own bits, the task's values from the previous ones, unscaled values from
those. A distance d is 2d, or -2d - 1 below zero, so that small ones have small bytes whatever their sign. The bytes of
one place (the most significant ones first) form a plane, and each plane is a raw DEFLATE stream (RFC 1951) of its own:
exponents and distances repeat and shrink, and significands do not. A stream is uint8:

    byte 0      the dtype's number in DTYPES
    the rest    the planes' DEFLATE streams, end to end: part after part, in the order of PACKED_ORDER
"""

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from piece_ds.state.weights_hash import bits_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PACKED_ORDER = ("previous", "values", "unscaled")
_UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}
# Repeats of one byte and Huffman's code: smaller and three times faster here than a search for longer repeats.
_LEVEL, _MEMORY, _STRATEGY = 6, 9, zlib.Z_RLE


def pack_values(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the parts of one parameter as one stream. Equal parts and an equal zlib give equal bytes.

    Args:
        parts: some of PACKED_ORDER -> 1-D values on the CPU, of one length and one dtype of DTYPES.
    Returns:
        uint8, 1-D.
    Cost: some 40 million values a second on one quiet core, in bf16. Memory: some 6 times the parts.
    """
    planes, before = [], None
    for name in (part for part in PACKED_ORDER if part in parts):
        bits = _bits(parts[name])
        distances = bits if before is None else _distances(_ordered(bits), before)
        before = _ordered(bits)
        # Little-endian numbers: the last byte of each is the most significant one.
        table = distances.astype(distances.dtype.newbyteorder("<")).view(np.uint8).reshape(bits.size, -1)
        planes += [_deflated(table[:, place].tobytes()) for place in reversed(range(table.shape[1]))]
    dtype = next(iter(parts.values())).dtype
    return torch.frombuffer(bytearray(b"".join([bytes([DTYPES.index(dtype)]), *planes])), dtype=torch.uint8)


def unpack_values(stream: Tensor, names: Sequence[str], count: int) -> dict[str, Tensor]:
    """Return the parts in a stream.

    Args:
        stream: as pack_values() wrote it, or damaged.
        names: of the parts that it must hold.
        count: values of each.
    Raises:
        ValueError: the stream does not hold exactly these; the text says in what way.
    Memory: some 10 times the parts, whatever a damaged stream promises.
    """
    if stream.dtype != torch.uint8 or stream.dim() != 1 or not stream.numel():
        raise ValueError(f"expected 1-D uint8, got {stream.dtype} {list(stream.shape)}")
    data = stream.numpy().tobytes()
    if data[0] >= len(DTYPES):
        raise ValueError(f"its first byte is {data[0]}, expected the number of a dtype below {len(DTYPES)}")
    dtype, rest = DTYPES[data[0]], data[1:]
    parts, before = {}, None
    for name in (part for part in PACKED_ORDER if part in names):
        # The planes of this part.
        table = np.empty((count, dtype.itemsize), dtype=np.uint8)
        for place in reversed(range(dtype.itemsize)):
            plane, rest = _inflated(rest, count)
            table[:, place] = plane
        distances = table.view(np.dtype(_UNSIGNED[dtype.itemsize]).newbyteorder("<")).reshape(count)
        distances = distances.astype(_UNSIGNED[dtype.itemsize])

        # Its values.
        ordered = _ordered(distances) if before is None else before + _signed(distances)
        before = ordered
        parts[name] = torch.from_numpy(_bits_of_ordered(ordered)).view(dtype)
    if rest:
        raise ValueError(f"it has {len(rest)} bytes past its last value")
    return parts


def _bits(values: Tensor) -> np.ndarray:
    numbers = bits_of(values.contiguous()).numpy()
    return numbers.view(_UNSIGNED[numbers.itemsize])


def _top(numbers: np.ndarray) -> np.ndarray:
    """Return the sign bit of their width, as a number of their dtype."""
    return np.array(1 << (8 * numbers.itemsize - 1), dtype=numbers.dtype)


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Return numbers that grow with the values: neighbours among the representable values differ by one."""
    top = _top(bits)
    return np.where(bits & top, ~bits, bits | top)


def _bits_of_ordered(ordered: np.ndarray) -> np.ndarray:
    top = _top(ordered)
    return np.where(ordered & top, ordered ^ top, ~ordered)


def _distances(ordered: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the distances modulo 2**width, the sign in the lowest bit."""
    moved = ordered - before
    doubled = moved << np.array(1, dtype=moved.dtype)
    return np.where(moved & _top(moved), ~doubled, doubled)


def _signed(distances: np.ndarray) -> np.ndarray:
    one = np.array(1, dtype=distances.dtype)
    halved = distances >> one
    return np.where(distances & one, ~halved, halved)


def _deflated(plane: bytes) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, _MEMORY, _STRATEGY)
    return packer.compress(plane) + packer.flush()


def _inflated(data: bytes, count: int) -> tuple[np.ndarray, bytes]:
    """Return (one plane, the bytes after its stream). A stream of more than count bytes is not unpacked further."""
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than there may be, so that a longer plane is seen.
        plane = unpacker.decompress(data, count + 1)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked ({error})") from None
    if len(plane) != count or not unpacker.eof:
        raise ValueError(f"a plane of it does not hold {count} bytes")
    return np.frombuffer(plane, dtype=np.uint8), unpacker.unused_data
