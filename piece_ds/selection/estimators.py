"""The registry of importance estimators. Adding one is a scoring function and a line in _ESTIMATORS.

A scoring function receives one Fragment (a run of elements of one parameter, on one rank) and returns its scores:
fp32, 1-D, larger is more important, >= +0 and never NaN. It must depend only on the elements, not on where a rank's
range begins, so that the mask is the same for every number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.runtime.errors import UserError, nearest


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter.

    Attributes:
        parameter_index: position of the parameter in named_parameters().
        start: flat row-major index of the first element in the whole parameter.
        numel: elements in the run.
        device: where scores are wanted.
        square_sum, grad_sum: statistics of these elements, fp32, or None where the method needs none.
        weight: returns the current values of these elements, fp32 (read only when called).
        lam: lambda of the second-order normalization.
        seed: of methods that draw.
    """

    parameter_index: int
    start: int
    numel: int
    device: torch.device
    square_sum: Tensor | None
    grad_sum: Tensor | None
    weight: Callable[[], Tensor]
    lam: float = 1.0
    seed: int = 0


def second_order(fragment: Fragment) -> Tensor:
    """PIECE-S: |sum of g| / sqrt(sum of g^2 + lambda)."""
    assert fragment.square_sum is not None
    return ops.score(fragment.grad_sum, fragment.square_sum, fragment.lam)


def fisher(fragment: Fragment) -> Tensor:
    """PIECE-F: the diagonal empirical Fisher information, sum of g^2."""
    assert fragment.square_sum is not None
    return ops.score(None, fragment.square_sum)


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


@dataclass(frozen=True)
class Estimator:
    """How a method scores elements.

    Attributes:
        score: Fragment -> fp32 scores.
        needs_squares: uses the sum of squared gradients (a statistics pass of 4 bytes per owned element).
        needs_sum: also uses the sum of gradients (4 bytes more).
        from_sums: score is ops.score of the sums (without grad_sum where needs_sum is False), so that selection can
            read the sums and never needs the scores themselves.
        source: where the idea comes from.
    """

    score: Callable[[Fragment], Tensor]
    needs_squares: bool
    needs_sum: bool
    from_sums: bool
    source: str


_ESTIMATORS = {
    "piece-f": Estimator(fisher, True, False, True, "arXiv 2511.15375, PIECE-F: diagonal empirical Fisher"),
    "piece-s": Estimator(second_order, True, True, True, "arXiv 2511.15375, PIECE-S: second-order normalization"),
    "random": Estimator(random_score, False, False, False, "baseline: uniform, seeded"),
    "magnitude": Estimator(magnitude, False, False, False, "baseline: largest absolute weight"),
}


def estimator_names() -> list[str]:
    return list(_ESTIMATORS)


def estimator(method: str) -> Estimator:
    """The estimator called method. Raises UserError with the nearest name."""
    if method not in _ESTIMATORS:
        known = estimator_names()
        raise UserError(
            f"--method {method!r} is no importance estimator; known: {', '.join(known)}.{nearest(method, known)}"
        )
    return _ESTIMATORS[method]
