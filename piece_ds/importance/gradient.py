"""Scores from gradient statistics: the two of the PIECE paper."""

from torch import Tensor

from piece_ds import ops
from piece_ds.importance.fragment import Fragment


def fisher(fragment: Fragment) -> Tensor:
    """PIECE-F: the diagonal empirical Fisher information, sum of g^2."""
    assert fragment.square_sum is not None
    return ops.score(None, fragment.square_sum)


def second_order(fragment: Fragment) -> Tensor:
    """PIECE-S: |sum of g| / sqrt(sum of g^2 + lambda)."""
    assert fragment.square_sum is not None
    return ops.score(fragment.grad_sum, fragment.square_sum, fragment.lam)
