"""The registry of importance estimators. Adding one is a scoring function and a line in _ESTIMATORS.

A scoring function receives one Fragment (a run of elements of one parameter, on one rank) and returns its scores:
fp32, 1-D, larger is more important, >= +0 and never NaN. It must depend only on the elements, not on where a rank's
range begins, so that the mask is the same for every number of ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from piece_ds.errors import UserError, nearest
from piece_ds.importance.data_free import magnitude, random_score
from piece_ds.importance.fragment import Fragment
from piece_ds.importance.gradient import fisher, second_order


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
        raise UserError(f"--method {method!r} is no importance estimator; known: {', '.join(known)}."
                        f"{nearest(method, known)}")  # fmt: skip
    return _ESTIMATORS[method]
