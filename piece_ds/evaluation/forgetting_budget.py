"""How much of a task to keep: the largest scale of its changes that forgets no more than a budget.

A task's changes multiplied by alpha lead from the base (0) to the task (1). The rise of the loss on general text is
what alpha costs. A few values are tried, from the task downwards, then halfway between the last that fits and the first
that does not; the curve need not be monotone, and only what was measured is ever returned.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isfinite, nan
from typing import Any

GRID = (1.0, 0.75, 0.5, 0.25)
MAX_TRIALS = 6


@dataclass(frozen=True)
class Trial:
    """What was measured at one alpha.

    Attributes:
        alpha: what the task's changes were multiplied by.
        general_loss: nats per token of the search half of the general text.
        score: of the validation rows, higher is better; None when nothing was validated.
    """

    alpha: float
    general_loss: float
    score: float | None = None


@dataclass(frozen=True)
class ForgettingCurve:
    """A search and what it chose.

    Attributes:
        alpha: chosen; 0 when nothing that was tried fits.
        budget: the rise that was allowed, nats.
        before: general loss at alpha 0.
        trials: what was measured, in the order of trying.
    """

    alpha: float
    budget: float
    before: float
    trials: tuple[Trial, ...]

    @property
    def rise(self) -> float:
        """Of the general loss at the chosen alpha, nats."""
        return next((trial.general_loss - self.before for trial in self.trials if trial.alpha == self.alpha), 0.0)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values, by rising alpha; a loss that is no finite number is null."""
        trials = [asdict(trial) for trial in sorted(self.trials, key=lambda trial: trial.alpha)]
        for trial in trials:
            trial["general_loss"] = trial["general_loss"] if isfinite(trial["general_loss"]) else None
        return {"alpha": self.alpha, "budget": self.budget, "before": self.before, "trials": trials}


def search_scale(
    measure: Callable[[float], tuple[float, float | None]], before: float, budget: float, max_trials: int = MAX_TRIALS
) -> ForgettingCurve:
    """Choose alpha.

    With validation scores the whole grid is tried, and the best score among what fits wins, ties to the larger alpha;
    without them the search stops at the largest that fits, and a task that fits as it is costs one trial.

    Args:
        measure: alpha -> (general loss in nats, validation score or None). It is called at most max_trials times.
        before: general loss at alpha 0.
        budget: allowed rise of the general loss, nats, 0 or more.
    Raises:
        ValueError: before or budget is not finite, budget below 0, or max_trials below 1.
    """
    if not isfinite(before) or not isfinite(budget) or budget < 0:
        raise ValueError(f"expected a finite loss and a budget of 0 or more, got {before} and {budget}")
    if max_trials < 1:
        raise ValueError(f"expected at least one trial, got {max_trials}")
    trials: list[Trial] = []

    def fits(trial: Trial) -> bool:
        return trial.general_loss - before <= budget  # False for NaN

    def run(alpha: float) -> Trial:
        loss, score = measure(alpha)
        trials.append(Trial(alpha, loss, None if score is None or score != score else score))
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

    fitting_trials = [trial for trial in trials if fits(trial)]
    best = max(fitting_trials, key=_preference, default=Trial(0.0, nan))
    return ForgettingCurve(best.alpha, budget, before, tuple(trials))


def _preference(trial: Trial) -> tuple[float, float]:
    """By score, then by alpha; what was not scored counts last."""
    return (-float("inf") if trial.score is None else trial.score, trial.alpha)
