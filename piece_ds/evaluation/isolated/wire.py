"""Values between judge and program: JSON that names each value's type and builds only builtin types.

The judge reads what nobody has checked. So there is no pickle and no class of the program; lengths are bounded, and
there is a deadline.
"""

import json
import os
import select
import time
from fractions import Fraction
from typing import Any

MAX_BYTES = 8 << 20  # of one message
MAX_BITS = 1 << 20  # of one whole number


class WireError(Exception):
    """The other side is gone, late, or sends what cannot be."""


def encode(value: Any) -> Any:
    """Return value as JSON. Raise WireError if it is not of a builtin type or a Fraction."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise WireError("a whole number is too long")
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float(value).hex()]
    if isinstance(value, complex):
        return ["complex", float(value.real).hex(), float(value.imag).hex()]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, Fraction):
        return ["fraction", hex(value.numerator), hex(value.denominator)]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(entry)] for key, entry in value.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    raise WireError(f"{type(value).__name__} is no plain value")


def decode(content: Any) -> Any:
    """Return the value that encode() was given. Raise WireError for anything else."""
    if content is None or isinstance(content, bool | str):
        return content
    if not isinstance(content, list) or not content or not isinstance(content[0], str):
        raise WireError("not a value")
    kind, *parts = content
    if kind in _COLLECTIONS:
        return _COLLECTIONS[kind](decode(part) for part in parts)
    if kind == "dict":
        return {decode(key): decode(entry) for key, entry in parts}
    if kind not in _SCALARS or not all(isinstance(part, str) for part in parts):
        raise WireError("not a value")
    return _SCALARS[kind](*parts)


_COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_SCALARS: dict[str, Any] = {
    "int": lambda text: int(text, 16),
    "float": float.fromhex,
    "complex": lambda real, imag: complex(float.fromhex(real), float.fromhex(imag)),
    "bytes": bytes.fromhex,
    "fraction": lambda above, below: Fraction(int(above, 16), int(below, 16)),
}


def send(descriptor: int, message: Any) -> None:
    """Write one message, a line of JSON. Raise WireError if the other side is gone or the message is too long."""
    data = memoryview(json.dumps(message).encode() + b"\n")
    if len(data) > MAX_BYTES:
        raise WireError("a message is too long")
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        raise WireError(str(error)) from None


class Receiver:
    """Reads messages from a pipe."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor, self._left = descriptor, b""

    def receive(self, deadline: float | None = None) -> Any:
        """Return the next message. Raise WireError at the deadline (time.monotonic()), or for what is no message."""
        pieces = [self._left]
        size = len(self._left)
        while b"\n" not in pieces[-1]:
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self.descriptor], [], [], left)[0]:
                    raise WireError("too late")
            piece = os.read(self.descriptor, 1 << 16)
            size += len(piece)
            if not piece or size > MAX_BYTES:
                raise WireError("the other side is gone, or says too much")
            pieces.append(piece)
        line, _, self._left = b"".join(pieces).partition(b"\n")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise WireError("not JSON") from None
