"""How much of a task to keep: the largest scale of its changes that forgets no more than a budget allows.

A task's changes are multiplied by alpha: 0 is the base, 1 the task. The price of alpha is the rise of the loss on
general text, plus its standard error: a few rows say little, and the budget is meant for text that nobody measured. A
few values are tried, from 1 downwards. Then the search halves the interval between the largest value
that fits and the next larger one. The curve need not be monotone, so only measured values are ever returned.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import isfinite, isnan, nan
from typing import Any

GRID = (1.0, 0.75, 0.5, 0.25)
MAX_TRIALS = 6


@dataclass(frozen=True)
class Trial:
    """What was measured at one alpha.

    Attributes:
        alpha: factor of the task's changes.
        general_loss: nats per token of the part of the general text that the search uses.
        score: of the validation rows, higher is better; None if nothing was validated.
        standard_error: of the rise of general_loss, nats; 0 if it is not known.
    """

    alpha: float
    general_loss: float
    score: float | None = None
    standard_error: float = 0.0


@dataclass(frozen=True)
class ForgettingCurve:
    """A search and its choice.

    Attributes:
        alpha: the chosen one; 0 if no value that was tried fits.
        budget: allowed rise of the general loss, nats.
        before: general loss at alpha 0, nats.
        trials: in the order of trying.
    """

    alpha: float
    budget: float
    before: float
    trials: tuple[Trial, ...]

    @property
    def rise(self) -> float:
        """Rise of the general loss at the chosen alpha, nats."""
        return next((trial.general_loss - self.before for trial in self.trials if trial.alpha == self.alpha), 0.0)

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready values, with trials sorted by alpha. A loss that is not finite becomes null."""
        trials = [asdict(trial) for trial in sorted(self.trials, key=lambda trial: trial.alpha)]
        for trial in trials:
            for name in ("general_loss", "standard_error"):
                trial[name] = trial[name] if isfinite(trial[name]) else None
        return {"alpha": self.alpha, "budget": self.budget, "before": self.before, "trials": trials}


def search_scale(
    measure: Callable[[float], Trial], before: float, budget: float, max_trials: int = MAX_TRIALS
) -> ForgettingCurve:
    """Search for alpha within a budget of forgetting.

    An alpha fits if the rise and its standard error together stay within the budget.

    With validation scores the whole grid is tried. The best score among values that fit wins; ties go to the larger
    alpha. Without scores the grid is tried only down to the largest value that fits. A task that fits as it is costs
    one trial.

    Args:
        measure: alpha -> its trial.
        before: general loss at alpha 0, nats.
        budget: allowed rise of the general loss, nats, 0 or more.
        max_trials: most calls of measure, 1 or more.
    Raises:
        ValueError: before or budget is not finite, budget is below 0, or max_trials is below 1.
    """
    if not isfinite(before) or not isfinite(budget) or budget < 0:
        raise ValueError(f"expected a finite loss and a budget of 0 or more, got {before} and {budget}")
    if max_trials < 1:
        raise ValueError(f"expected at least one trial, got {max_trials}")

    # Every trial is kept: the curve is part of the result.
    trials: list[Trial] = []

    def fits(trial: Trial) -> bool:
        return trial.general_loss - before + trial.standard_error <= budget  # False for NaN

    def run(alpha: float) -> Trial:
        trial = measure(alpha)
        trials.append(replace(trial, score=None) if trial.score is not None and isnan(trial.score) else trial)
        return trials[-1]

    # The grid, downwards.
    for alpha in GRID[:max_trials]:
        trial = run(alpha)
        if fits(trial) and trial.score is None:
            break

    # Halfway between the largest that fits and the next larger one, which does not.
    while len(trials) < max_trials:
        fitting = max((trial.alpha for trial in trials if fits(trial)), default=0.0)
        larger = min((trial.alpha for trial in trials if trial.alpha > fitting), default=None)
        if larger is None:
            break
        run((fitting + larger) / 2)

    # Choose among what was measured.
    fitting_trials = [trial for trial in trials if fits(trial)]
    best = max(fitting_trials, key=_preference, default=Trial(0.0, nan))
    return ForgettingCurve(best.alpha, budget, before, tuple(trials))


def _preference(trial: Trial) -> tuple[float, float]:
    """Return the sort key of a trial: its score, then its alpha. Trials without a score come last."""
    return (-float("inf") if trial.score is None else trial.score, trial.alpha)
