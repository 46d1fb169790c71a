"""Decide from a task's evaluations which step is its best one, and when no better one is to be expected.

Everything follows from the list of evaluations, which the trainer's log holds. So a resumed run decides as one that was
not interrupted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

LOSS, SCORE, LOSS_WITHIN_BUDGET = "loss", "score", "loss_within_budget"
METRICS = (LOSS, SCORE, LOSS_WITHIN_BUDGET)

# Where the trainer's log has the loss on general text before the task's first step.
GENERAL_BEFORE = "eval_general_loss_before"


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the held-out rows after a step.

    Attributes:
        step: number of optimizer steps before it.
        loss: nats per answer token.
        score: the task's score, in [0, 1]; None if it was not taken.
        general_rise: how much the loss on general text has risen since before the task, nats per token; None if it was
            not taken.
    """

    step: int
    loss: float
    score: float | None = None
    general_rise: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Return JSON-ready values; what is not finite is None."""
        values = {"loss": self.loss, "score": self.score, "general_rise": self.general_rise}
        shown = {name: value if value is None or isfinite(value) else None for name, value in values.items()}
        return {
            "step": self.step,
            **{name: value for name, value in shown.items() if name == LOSS or value is not None},
        }


@dataclass(frozen=True)
class Rule:
    """What makes one evaluation better than another, and how long to wait for a better one.

    Attributes:
        metric: one of METRICS. loss_within_budget: a step that keeps the budget is better than one that does not; of
            two that keep it, the one of less loss; of two that do not, the one whose general loss rose less.
        greater_is_better: of loss and score.
        budget: of loss_within_budget, nats per token.
        patience: evaluations in a row without a gain after which training ends; None never ends it.
        threshold: the least difference that is a gain.
    """

    metric: str = LOSS
    greater_is_better: bool = False
    budget: float | None = None
    patience: int | None = None
    threshold: float = 0.0

    def is_better(self, new: Evaluation, best: Evaluation | None) -> bool:
        """Return whether new is better than best. What is not finite is no better than anything."""
        level, merit = self._merit(new)
        return level >= 0 and (best is None or (level, merit) > self._merit(best))

    def is_gain(self, new: Evaluation, best: Evaluation | None) -> bool:
        """Return whether new is better than best by more than the threshold."""
        if best is None or not self.is_better(new, best):
            return self.is_better(new, best)
        (level, merit), (best_level, best_merit) = self._merit(new), self._merit(best)
        return level > best_level or merit - best_merit > self.threshold

    def _merit(self, found: Evaluation) -> tuple[int, float]:
        """Return a pair that is larger the better the evaluation is; the first is -1 if nothing finite was measured."""
        if self.metric == LOSS_WITHIN_BUDGET:
            assert self.budget is not None
            rise = found.general_rise
            if rise is None or not isfinite(rise) or not isfinite(found.loss):
                return -1, 0.0
            return (1, -found.loss) if rise <= self.budget else (0, -rise)
        value = found.loss if self.metric == LOSS else found.score
        if value is None or not isfinite(value):
            return -1, 0.0
        return 0, value if self.greater_is_better else -value


def best_of(evaluations: Iterable[Evaluation], rule: Rule) -> tuple[Evaluation | None, int]:
    """Return the first of the best evaluations, and how many in a row were no gain since the last one.

    Args:
        evaluations: in order of steps. Those before the first step are left out.
        rule: what is better. Patience counts as transformers' EarlyStoppingCallback does: the first evaluation of all
            costs none.
    Returns:
        The best, or None if no evaluation is finite; and the number of evaluations without a gain.
    """
    best, num_without_gain = None, 0
    for place, found in enumerate(evaluation for evaluation in evaluations if evaluation.step > 0):
        num_without_gain = 0 if place == 0 or rule.is_gain(found, best) else num_without_gain + 1
        if rule.is_better(found, best):
            best = found
    return best, num_without_gain


def evaluations_in(log: Sequence[Mapping[str, Any]]) -> list[Evaluation]:
    """Return the evaluations in a trainer's log, one a step; a resumed run may have repeated one."""
    before = next((row[GENERAL_BEFORE] for row in log if GENERAL_BEFORE in row), None)
    found: dict[int, Evaluation] = {}
    for row in log:
        if "eval_loss" in row:
            general = row.get("eval_general_loss")
            rise = None if general is None or before is None else general - before
            one = Evaluation(int(row["step"]), row["eval_loss"], row.get("eval_score"), rise)
            found.setdefault(one.step, one)
    return list(found.values())
