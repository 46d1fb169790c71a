"""Hash positions by splitmix64 (Steele, Lea, Flood 2014), the same on every device and for every number of ranks."""

from torch import Tensor

# Odd 64-bit constants as signed integers: integer products wrap in torch.
GAMMA = -0x61C8864680B583EB
_MIX_1, _MIX_2 = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def mix(x: Tensor) -> Tensor:
    """Return splitmix64's finalizer of every int64 of x."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Return x shifted logically. torch's shift is arithmetic on signed numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
