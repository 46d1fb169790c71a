"""Add non-negative fp32 numbers without any rounding: the same bits in any order and on any number of ranks.

A number is 24 bits at one of 254 places, so a sum is a long integer. It is kept as digits in base 2**32, and carries
stay in int64 until the end. Adding digits commutes, unlike adding floating-point numbers.

Legend: N numbers, U sums, D digits.
"""

import math

import numpy as np
import torch
from torch import Tensor

DIGIT_BITS = 32
# 277 bits of the largest fp32 number in units of the smallest, and 31 for how many there are: ten digits.
NUM_DIGITS = 10
INFINITE = NUM_DIGITS  # the place that counts infinities
UNIT_EXPONENT = -149  # the smallest positive fp32 number is 2**-149


def empty_sums(num_sums: int, device: torch.device | str) -> Tensor:
    """Return zeros: int64 [num_sums, NUM_DIGITS + 1], 88 bytes a sum."""
    return torch.zeros(num_sums, NUM_DIGITS + 1, dtype=torch.int64, device=device)


def add_(sums_UD: Tensor, number_N: Tensor, sum_N: Tensor) -> None:
    """Add each number to its sum, exactly. Sums of several ranks may be added element by element.

    Args:
        sums_UD: from empty_sums().
        number_N: fp32, >= 0, never NaN.
        sum_N: the row of sums_UD that each number belongs to, int64. At most 2**30 numbers to a row.
    Cost: 64 bytes a number during the call.
    """
    # Take the number apart.
    key_N = number_N.view(torch.int32).to(torch.int64)
    exponent_N = key_N >> 23
    mantissa_N = (key_N & 0x7FFFFF) | ((exponent_N > 0).to(torch.int64) << 23)
    place_N = exponent_N.clamp(min=1) - 1  # subnormal numbers have the place of the smallest normal ones
    is_infinite_N = exponent_N == 0xFF

    # 24 bits moved by less than a digit reach into two digits.
    moved_N = mantissa_N << (place_N % DIGIT_BITS)
    low_N = torch.where(is_infinite_N, 1, moved_N & (2**DIGIT_BITS - 1))
    high_N = torch.where(is_infinite_N, 0, moved_N >> DIGIT_BITS)
    digit_N = torch.where(is_infinite_N, INFINITE, place_N // DIGIT_BITS)
    flat = sums_UD.view(-1)
    where_N = sum_N * (NUM_DIGITS + 1) + digit_N
    flat.index_add_(0, where_N, low_N)
    flat.index_add_(0, torch.where(is_infinite_N, where_N, where_N + 1), high_N)


def means(sums_UD: Tensor, count: int) -> np.ndarray:
    """Return each exact sum, rounded once to fp64, divided by count in fp64; inf if a number was infinite.

    Cost: about a microsecond of Python a sum.
    """
    # Carry, then read each row of digits as one integer.
    digits = sums_UD.cpu().numpy().copy()
    for digit in range(NUM_DIGITS - 1):
        digits[:, digit + 1] += digits[:, digit] >> DIGIT_BITS
        digits[:, digit] &= 2**DIGIT_BITS - 1
    rows = digits[:, :NUM_DIGITS].astype("<u4")
    exact = (math.ldexp(float(int.from_bytes(row.tobytes(), "little")), UNIT_EXPONENT) for row in rows)
    found = np.fromiter(exact, np.float64, len(rows)) / count
    found[digits[:, INFINITE] > 0] = np.inf
    return found
