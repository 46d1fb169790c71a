"""Define importance estimators: pure scoring functions, with what each needs. For their names see methods/table.py.

A scoring function receives one Fragment (a run of elements of one parameter, on one rank) and returns its scores: fp32,
1-D, larger is more important, >= +0 and never NaN. It must depend only on the elements, not on where a rank's range
begins, so that the mask is the same for every number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.state.splitmix import GAMMA, mix


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter.

    Attributes:
        parameter_index: position of the parameter in named_parameters().
        start: flat row-major index of the first element in the whole parameter.
        numel: elements in the run.
        device: on which scores are wanted.
        square_sum, grad_sum: statistics of these elements, fp32, or None if the method needs none.
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
    """Return PIECE-S scores: |sum of g| / sqrt(sum of g^2 + lambda)."""
    assert fragment.square_sum is not None
    return ops.score(fragment.grad_sum, fragment.square_sum, fragment.lam)


def fisher(fragment: Fragment) -> Tensor:
    """Return PIECE-F scores: the diagonal empirical Fisher information, sum of g^2."""
    assert fragment.square_sum is not None
    return ops.score(None, fragment.square_sum)


def zeroing(fragment: Fragment) -> Tensor:
    """Return the first-order gain of setting a weight to zero: weight * sum of g where it is positive, else 0."""
    assert fragment.grad_sum is not None
    gain = fragment.weight().to(fragment.device) * fragment.grad_sum
    return gain.nan_to_num_(nan=0.0, posinf=float("inf")).clamp_(min=0.0).add_(0.0)


_NUM_FINITE_KEYS = 0x7F800000  # bit patterns of non-negative finite fp32 numbers


def magnitude(fragment: Fragment) -> Tensor:
    """Return the absolute weight."""
    return fragment.weight().to(fragment.device).abs().nan_to_num_(nan=0.0, posinf=float("inf")).add_(0.0)


def random_score(fragment: Fragment) -> Tensor:
    """Return a counter-based hash of (seed, parameter, element), uniform over the keys of non-negative fp32 numbers.

    A generator's stream would depend on where ranges begin. A hash of the position does not.
    """
    position = torch.arange(fragment.start, fragment.start + fragment.numel, device=fragment.device)
    stream = mix(torch.tensor(fragment.seed * 1_000_003 + fragment.parameter_index, device=fragment.device) + GAMMA)
    return (mix((position ^ stream) + GAMMA).remainder_(_NUM_FINITE_KEYS)).to(torch.int32).view(torch.float32)


# What statistics of the gradient g over the task's micro-batches a method needs, from nothing to both sums.
NEEDS = ("nothing", "squares", "sum", "sum and squares")


@dataclass(frozen=True)
class Estimator:
    """How a method scores elements.

    Attributes:
        name: of the method; the mask bears it.
        score: Fragment -> fp32 scores.
        needs: one of NEEDS. If anything is needed, the sum of squares is kept (4 bytes per owned element). The sum of
            gradients costs 4 bytes more.
        from_sums: score is ops.score of the sums (without grad_sum if only squares are needed). Selection can then read
            the sums and never needs the scores themselves.
    """

    name: str
    score: Callable[[Fragment], Tensor]
    needs: str = "nothing"
    from_sums: bool = False

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise ValueError(f"estimator {self.name!r}: needs is {self.needs!r}, expected one of {', '.join(NEEDS)}")

    @property
    def needs_statistics(self) -> bool:
        """Whether a pass over the task's data is needed."""
        return self.needs != "nothing"

    @property
    def needs_sum(self) -> bool:
        """Whether that pass must keep the sum of gradients too."""
        return "sum" in self.needs


PIECE_F = Estimator("piece-f", fisher, "squares", from_sums=True)
PIECE_S = Estimator("piece-s", second_order, "sum and squares", from_sums=True)
TAYLOR = Estimator("taylor", zeroing, "sum and squares")
RANDOM = Estimator("random", random_score)
MAGNITUDE = Estimator("magnitude", magnitude)


def checked(estimator: Estimator) -> Estimator:
    """Return estimator with a check of every fragment's scores, for functions that others wrote.

    The wrapped function raises ValueError for scores of another shape or dtype, negative ones and NaN.

    Cost: a pass over the scores of 4 M elements at a time.
    """

    def score(fragment: Fragment) -> Tensor:
        found = estimator.score(fragment)
        if not isinstance(found, Tensor) or found.dtype != torch.float32 or found.shape != (fragment.numel,):
            shown = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"estimator {estimator.name!r} returned {shown}, expected torch.float32 ({fragment.numel},): "
                "one score per element"
            )
        if not bool((found >= 0).all()):
            raise ValueError(
                f"estimator {estimator.name!r} returned a score that is negative or NaN: scores must be >= 0"
            )
        return (found + 0.0).to(fragment.device)  # -0.0 becomes 0.0: scores are compared by their bits

    return replace(estimator, score=score)
