"""Values that hurt, and what numpy says about scores: shared by the tests of the ops."""

import numpy as np
import torch
from torch import Tensor

F32 = np.float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -1e-40, 1e-39, 3.4e38, 1.0, -1.0]
INSTRUCTION_SETS = ["avx512", "avx2", "scalar"]  # of the C++ provider
BLOCK = 1 << 15  # elements that a thread of the C++ provider takes at once (kBlock in csrc/cpu/parallel.h)


def values(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """n numbers over many magnitudes, with every special one at the start and again at the end."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy((rng.standard_normal(n) * 10.0 ** rng.integers(-20, 15, n)).astype(F32))
    special = torch.tensor(SPECIAL)[:n]
    x[: special.numel()] = special
    if n > 2 * len(SPECIAL):
        x[-len(SPECIAL) :] = torch.tensor(SPECIAL)
    return x.to(dtype)


def sums(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(grad_sum, square_sum) of n elements, special values included, at an odd place of a larger buffer."""
    return values(n + 1, seed=seed)[1:], values(n + 3, seed=seed + 1).abs()[3:]


def positions(n: int, density: float) -> np.ndarray:
    return np.flatnonzero(np.random.default_rng(n).random(n) < density)


def assert_same_bits(got: Tensor, want: np.ndarray) -> None:
    """Equal bits, which tells +0 from -0 and compares NaN."""
    bits = {4: np.uint32, 8: np.uint64, 2: np.uint16, 1: np.uint8}[want.dtype.itemsize]
    assert got.numpy().dtype == want.dtype
    np.testing.assert_array_equal(got.numpy().view(bits), want.view(bits))


def scores(grad_sum: Tensor | None, square_sum: Tensor, lam: float = 1.0) -> np.ndarray:
    """The scores by numpy, whose square root and division are IEEE's."""
    square = square_sum.numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        result = square.copy() if grad_sum is None else np.abs(grad_sum.numpy()) / np.sqrt(square + F32(lam))
    result[np.isnan(result)] = 0.0
    return result


def accumulated(grad: Tensor, scale: float) -> tuple[np.ndarray, np.ndarray, int]:
    """What one gradient adds to both sums, and the number of its non-finite entries, by numpy."""
    g = grad.float().numpy()
    finite = np.isfinite(g)
    with np.errstate(over="ignore"):
        g = (np.where(finite, g, F32(0)) * F32(scale)).astype(F32)
        return g, (g * g).astype(F32), int((~finite).sum())
