"""Learning against keeping: the curve of a method over learning rates, and what it costs at a given learning.

A learning rate buys learning with forgetting, so methods are compared where they learned the same. `learned` is a loss:
lower is more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from piece_ds.report.intervals import Interval, over_repetitions


@dataclass(frozen=True)
class Point:
    """One run on the way from learning to keeping.

    Attributes:
        rate: its learning rate.
        learned: mean loss of the tasks, each right after it was learned; nats per token.
        lost: what is compared at equal learning, such as the rise of the general loss; lower is better.
    """

    rate: float
    learned: float
    lost: float


Curve = Sequence[Point]


def useful_points(curve: Curve) -> list[Point]:
    """Return the runs of a curve by rate, without those that diverged, up to the rate that learned the most."""
    points = sorted((p for p in curve if isfinite(p.learned) and isfinite(p.lost)), key=lambda p: p.rate)
    return points[: 1 + min(range(len(points)), key=lambda i: points[i].learned)] if points else []


def lost_at(curve: Curve, level: float) -> float | None:
    """What a curve loses where it has learned exactly level; None where it does not pass through level.

    Neighbouring rates are joined by a straight line in (learned, lost), of useful_points() only; a curve that passes
    level more than once all the same is judged at its best passage. Nothing is extrapolated: a curve that never learned
    that much, or whose smallest rate learned more already, has no value.
    """
    points = useful_points(curve)
    found = [point.lost for point in points if point.learned == level]
    for first, second in pairwise(points):
        if min(first.learned, second.learned) < level < max(first.learned, second.learned):
            share = (level - first.learned) / (second.learned - first.learned)
            found.append(first.lost + share * (second.lost - first.lost))
    return min(found, default=None)


def why_not(curves: Sequence[Curve], level: float) -> str:
    """Why no curve has a value at level: 'not reached', or 'passed' by the smallest rate already."""
    learned = [point.learned for curve in curves for point in curve if isfinite(point.learned)]
    return "not reached" if not learned or min(learned) > level else "passed"


def matched(curves: Sequence[Curve], level: float, confidence: float = 0.95) -> tuple[Interval | None, int]:
    """lost_at of each seed's curve as one interval over the seeds that pass through level, and how many do not."""
    values = [lost_at(curve, level) for curve in curves]
    known = [value for value in values if value is not None]
    return (over_repetitions(known, confidence) if known else None), len(values) - len(known)


def levels(start: float, best: float, shares: Sequence[float]) -> list[float]:
    """The learned losses at shares of the way from start (before any task) to best (the most that was learned)."""
    return [start - share * (start - best) for share in shares]
