"""Scores that need no data: uniform random and weight magnitude, the baselines every mask must beat."""

import torch
from torch import Tensor

from piece_ds.importance.fragment import Fragment

# splitmix64's increment and multipliers (Steele et al. 2014) as signed 64-bit numbers: integer products wrap in torch.
_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
_NUM_FINITE_KEYS = 0x7F800000  # bit patterns of non-negative finite fp32 numbers


def magnitude(fragment: Fragment) -> Tensor:
    """The absolute weight."""
    return fragment.weight().to(fragment.device).abs().nan_to_num_(nan=0.0, posinf=float("inf")).add_(0.0)


def random_score(fragment: Fragment) -> Tensor:
    """A counter-based hash of (seed, parameter, element), uniform over the keys of non-negative fp32 numbers.

    A generator's stream would depend on where ranges begin; a hash of the position does not.
    """
    position = torch.arange(fragment.start, fragment.start + fragment.numel, device=fragment.device)
    stream = _splitmix(torch.tensor(fragment.seed * 1_000_003 + fragment.parameter_index, device=fragment.device))
    return (_splitmix(position ^ stream).remainder_(_NUM_FINITE_KEYS)).to(torch.int32).view(torch.float32)


def _splitmix(x: Tensor) -> Tensor:
    """One output of splitmix64 for every int64 of x."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's is arithmetic on signed numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
