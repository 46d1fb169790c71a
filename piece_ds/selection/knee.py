"""Propose how many weights to select, from how the scores are spread: those above the mean score.

Sort the scores and plot the share of their sum that the highest ones hold against their share of the weights. The curve
is farthest above the diagonal where a weight adds as much as the average one: its knee. Weights beyond it add less than
any weight on average. What a few weights hold gives a small share, what is spread over many a large one. It is a
proposal: the user says the ratio.
"""

import torch
from torch import Tensor

from piece_ds.selection.estimators import PIECE_F, Estimator
from piece_ds.selection.scores import ScoreSource, WeightReader
from piece_ds.selection.threshold import DIGITS, digit_counts
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats


def knee(counts_D: Tensor) -> int:
    """Return how many of the highest scores come before the knee; 0 if no score is positive.

    Args:
        counts_D: number of scores with each leading digit (8 bits of exponent, 3 of mantissa), int64.
    """
    # A digit stands for the middle of its values, within 6 %. Infinite scores count as the largest finite ones.
    shift, bits = DIGITS[0]
    counts = counts_D.double().cpu()
    keys = (torch.arange(1 << bits, dtype=torch.int64) << shift) + (1 << (shift - 1))
    values = keys.to(torch.int32).view(torch.float32).double()
    values[0] = 0.0
    largest = torch.finfo(torch.float32).max
    values = values.nan_to_num_(nan=largest, posinf=largest)

    # From the highest downwards: what the scores so far hold, above what as many average ones would.
    total, number = float((counts * values).sum()), float(counts.sum())
    if not total > 0:
        return 0
    taken = counts.flip(0).cumsum(0)
    above = (counts * values).flip(0).cumsum(0) / total - taken / number
    return int(taken[int(above.argmax())])


def proposed_ratio(
    scorer: Estimator,
    layout: Layout,
    stats: GradientStats,
    *,
    weight_of: WeightReader | None = None,
    lam: float = 1.0,
) -> float:
    """Return the ratio at the knee of the eligible elements' scores, selected / all elements. A collective.

    Args:
        scorer, layout, stats, weight_of, lam: as in select_by().
    Cost: produces the scores once; 16 KiB of communication; the host waits once.
    """
    group_of = {info.name: 0 for info in layout.eligible()}
    source = ScoreSource(layout, group_of, scorer, stats, weight_of, stats.square_sum.device, lam, 0)
    (shift, bits), device = DIGITS[0], stats.square_sum.device
    (counts_D,) = digit_counts(source.spans(), shift, bits, [0], device)
    return knee(counts_D) / layout.total


def proposed_ratio_of(score_N: Tensor, layout: Layout) -> float:
    """Return the same of given scores, laid out by layout.owned(). A collective."""
    return proposed_ratio(PIECE_F, layout, GradientStats(layout, score_N, None))
