"""Propose how many weights to select: the fewest that hold half of all scores.

In a diagonal model the score of piece-ratio, piece-gain and piece-ratio-activation is what a weight gains at its best
step, so their sum is the task's gain. Where a few weights hold half of it a small mask is enough; where it is spread
over many, much is to be learned. It is a proposal: the user says the ratio.
"""

import torch
from torch import Tensor

from piece_ds.selection.estimators import PIECE_F
from piece_ds.selection.scores import ScoreSource
from piece_ds.selection.threshold import DIGITS, digit_counts
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats

HELD = 0.5


def proposed_ratio(score_N: Tensor, layout: Layout) -> float:
    """Return the ratio at which the highest scores hold half of all: selected / all elements. A collective.

    Args:
        score_N: fp32, >= 0, laid out by layout.owned().
        layout: of the model; only eligible elements have scores.
    Cost: reads the scores once; 16 KiB of communication; the host waits once.
    """
    group_of = {info.name: 0 for info in layout.eligible()}
    stats = GradientStats(layout, score_N, None)
    source = ScoreSource(layout, group_of, PIECE_F, stats, None, score_N.device, 1.0, 0)
    shift, bits = DIGITS[0]
    (counts_D,) = digit_counts(source.spans(), shift, bits, [0], score_N.device)
    return num_holding(counts_D, HELD) / layout.total


def num_holding(counts_D: Tensor, share: float) -> int:
    """Return how many of the highest scores hold a share of the sum of all; 0 if no score is positive.

    Args:
        counts_D: number of scores with each leading digit (8 bits of exponent, 3 of mantissa), int64.
        share: in (0, 1].
    """
    # A digit stands for the middle of its values, within 6 %. Infinite scores count as the largest finite ones.
    shift, bits = DIGITS[0]
    counts = counts_D.double().cpu()
    keys = (torch.arange(1 << bits, dtype=torch.int64) << shift) + (1 << (shift - 1))
    values = keys.to(torch.int32).view(torch.float32).double()
    values[0] = 0.0
    largest = torch.finfo(torch.float32).max
    values = values.nan_to_num_(nan=largest, posinf=largest)

    # From the highest downwards, to the digit in which the share is reached, and into it as far as it takes.
    held = (counts * values).flip(0).cumsum(0)
    wanted = share * float(held[-1])
    if not wanted > 0:
        return 0
    place = int((held < wanted).sum())
    taken, value = counts.flip(0).cumsum(0), values.flip(0)[place]
    return int(taken[place] - (held[place] - wanted) // value)
