"""Ascending positions as gaps in Rice's code: 1.5 bytes an entry at 0.1 %, for 4 of int32.

A gap is the number of elements between an entry and the one before it; the first counts from element 0. Its low k bits
stand as they are, and the rest, gap >> k, in unary: as many 0 bits, then a 1. Bits are kept apart by meaning, so that
numpy reads and writes them without a loop over entries. A stream is uint8:

    byte 0          k, 0 to 62
    bytes 1 to 8    number of entries n, little-endian
    k planes        of ceil(n / 8) bytes each; plane j holds bit j of every gap, least significant bit of a byte first
    the rest        the unary parts, in the same order of bits; unused bits of the last byte are 0

Source: Rice 1979; k minimises the length, so that clustered positions take less and no choice can be wrong. At random
positions of density p the length is within 2 % of the entropy.
"""

import numpy as np
import torch
from torch import Tensor

_HEAD_BYTES = 9
_MAX_LOW_BITS = 62


def encode_gaps(index: Tensor) -> Tensor:
    """Return positions as one stream.

    Args:
        index: 1-D, ascending, at least one, int32 or int64 on the CPU.
    Returns:
        uint8, 1-D.
    Memory: some 20 bytes an entry.
    """
    positions = index.numpy().astype(np.int64)
    gaps = np.diff(positions, prepend=-1) - 1
    low_bits = _best_low_bits(gaps)

    # The low bits, a plane each.
    head = np.array([low_bits, *gaps.size.to_bytes(8, "little")], dtype=np.uint8)
    planes = [_packed((gaps >> bit) & 1) for bit in range(low_bits)]

    # The unary part of an entry ends where its 1 stands.
    ends = np.cumsum((gaps >> low_bits) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)
    unary[ends] = 1
    return torch.from_numpy(np.concatenate([head, *planes, _packed(unary)]))


def decode_gaps(stream: Tensor, count: int | None, numel: int) -> Tensor:
    """Return the positions in a stream, ascending, int64.

    Args:
        stream: as encode_gaps() wrote it, or damaged.
        count: how many entries there must be; None takes the stream's own word.
        numel: elements of the parameter.
    Raises:
        ValueError: the stream is not one of `count` positions below numel; the text says in what way.
    Memory: some 30 bytes an entry, and 8 times the stream.
    """
    # The head, and a length that fits it. Counts come from outside: nothing is allocated by them.
    if stream.dtype != torch.uint8 or stream.dim() != 1 or stream.numel() < _HEAD_BYTES:
        raise ValueError(f"expected 1-D uint8 of {_HEAD_BYTES} bytes or more, got {stream.dtype} {list(stream.shape)}")
    data, numel = stream.numpy(), min(numel, 2**_MAX_LOW_BITS)
    low_bits, found = int(data[0]), int.from_bytes(data[1:_HEAD_BYTES].tobytes(), "little")
    if low_bits > _MAX_LOW_BITS or not 1 <= found <= numel or count not in (None, found):
        raise ValueError(f"its head says {found} entries with {low_bits} low bits, expected {count or numel} entries")
    plane_bytes = -(-found // 8)
    body = data[_HEAD_BYTES:]
    planes, unary = body[: low_bits * plane_bytes], body[low_bits * plane_bytes :]
    if planes.size != low_bits * plane_bytes or int(np.bitwise_count(unary).sum(dtype=np.int64)) != found:
        raise ValueError(f"its {body.size} bytes do not hold {found} entries with {low_bits} low bits")

    # The unary parts, then the low bits. A part above numel would overflow when it is shifted.
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little"))
    if ends[-1] // 8 != unary.size - 1:
        raise ValueError("it has bytes past its last entry")
    gaps = np.diff(ends, prepend=-1) - 1
    if int(gaps.max()) > numel >> low_bits:
        raise ValueError(f"it names a position past the parameter's {numel} elements")
    gaps <<= low_bits
    # Eight planes at a time, turned round, are a byte of every entry's low bits.
    bits = np.unpackbits(planes.reshape(low_bits, plane_bytes), axis=1, bitorder="little")
    if bits[:, found:].any():
        raise ValueError("it has bits past its last entry")
    for first in range(0, low_bits, 8):
        part = np.packbits(bits[first : first + 8, :found], axis=0, bitorder="little")[0]
        gaps |= part.astype(np.int64) << first

    # Gaps of at most 2 numel each: found <= numel of them may still overflow, so the sum is compared in fp64 first.
    if gaps.sum(dtype=np.float64) > 2.0 * numel or int((gaps + 1).sum()) > numel:
        raise ValueError(f"it names a position past the parameter's {numel} elements")
    return torch.from_numpy(np.cumsum(gaps + 1) - 1)


def _best_low_bits(gaps: np.ndarray) -> int:
    """Return the k of the shortest stream."""
    around = int(gaps.mean()).bit_length()

    def num_bytes(low_bits: int) -> int:
        return low_bits * -(-gaps.size // 8) + -(-(gaps.size + int((gaps >> low_bits).sum())) // 8)

    return min(range(max(0, around - 3), around + 2), key=num_bytes)


def _packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits.astype(np.uint8), bitorder="little")
