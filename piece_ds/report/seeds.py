"""Several runs that differ in their seed as one: mean and confidence interval of every derived figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from piece_ds.errors import UserError
from piece_ds.report.results import RunResults


@dataclass(frozen=True)
class Interval:
    """A mean over runs and how sure it is.

    Attributes:
        mean: over the runs that have the figure.
        half_width: the interval is mean - half_width to mean + half_width; None with fewer than two runs.
        num_runs: runs that have the figure.
    """

    mean: float
    half_width: float | None
    num_runs: int


def over_seeds(runs: Sequence[RunResults], confidence: float = 0.95) -> dict[str, Interval]:
    """Figure -> its interval over runs, from Student's t with runs - 1 degrees of freedom.

    The figures are those of ResultMatrix.summary(); one that no run has is left out. The interval covers the runs'
    own randomness (order of rows, sampling), not the choice of test rows.

    Args:
        runs: finished or equally far, of the same method, ratio, tasks and metrics.
        confidence: in (0, 1).
    Raises:
        UserError: no run, or runs that are not the same but for their seed.
        ValueError: confidence outside of its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if not runs:
        raise UserError("an interval over seeds needs at least one run")
    for run in runs[1:]:
        for what, first, other in zip(_SAME, _identity(runs[0]), _identity(run), strict=True):
            if first != other:
                raise UserError(f"runs over seeds must have the same {what}: {runs[0].name} has {first}, "
                                f"{run.name} has {other}")  # fmt: skip
    summaries = [run.matrix.summary() for run in runs]
    known = {name: [s[name] for s in summaries if s[name] is not None] for name in summaries[0]}
    return {name: interval([float(v) for v in values if v is not None], confidence)
            for name, values in known.items() if values}  # fmt: skip


_SAME = ("method", "ratio", "tasks", "metrics", "number of finished tasks")


def _identity(run: RunResults) -> tuple[object, ...]:
    return run.method, run.ratio, run.tasks, run.matrix.metrics, len(run.matrix.loss.after)


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of at least one value and, of two or more, its interval from Student's t."""
    if len(values) < 2:
        return Interval(values[0], None, len(values))
    from scipy.stats import t  # a second to import

    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return Interval(fmean(values), quantile * stdev(values) / sqrt(len(values)), len(values))
