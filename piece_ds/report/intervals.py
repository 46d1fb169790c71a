"""How certain a figure is: over repetitions of a run, and over the choice of test rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean, stdev

from piece_ds.runtime.extras import require_extra

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over runs and its certainty.

    Attributes:
        mean: over the runs that have the figure.
        half_width: the interval is mean - half_width to mean + half_width; None for fewer than two runs.
    """

    mean: float
    half_width: float | None


def over_repetitions(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of at least one value and, for two or more, its interval from Student's t.

    Raises:
        UserError: scipy is not installed.
    """
    if len(values) < 2:
        return Interval(values[0], None)
    require_extra("statistics", "an interval over repeated runs")
    from scipy.stats import t  # takes a second to import

    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / sqrt(len(values)))


def over_rows(share: float, num_rows: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the ends of Wilson's score interval of a share of num_rows independent rows, in [0, 1].

    The interval has a width even at a share of 0 or 1. For the mean of values in [0, 1] it is an upper bound: no such
    values vary more than a share with the same mean.

    Source: Wilson 1927.
    """
    # Wilson's interval is centred between the share and 1/2, and never leaves [0, 1].
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * num_rows)
    reach = z * sqrt(share * (1 - share) / num_rows + (z / (2 * num_rows)) ** 2)
    scale = 1 + z * z / num_rows
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def over_rows_of_mean(shares: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Return the ends of the interval of the mean of shares, each over its own rows.

    The distances from the shares to the ends of their intervals are added in squares.

    Args:
        shares: (share in [0, 1], number of its rows), at least one.
    Source: MOVER; Zou and Donner 2008.
    """
    ends = [(share, *over_rows(share, num_rows)) for share, num_rows in shares]
    mean = fmean(share for share, _, _ in ends)
    below = sqrt(sum((share - low) ** 2 for share, low, _ in ends)) / len(ends)
    above = sqrt(sum((high - share) ** 2 for share, _, high in ends)) / len(ends)
    return mean - below, mean + above
