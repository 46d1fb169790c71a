"""EWC: a quadratic penalty holds each weight where it was, by the Fisher information of earlier tasks."""

from pathlib import Path
from typing import Any

from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.methods.baseline import Baseline, EngineCallback, TaskContext
from piece_ds.models.layout import layout_of
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.gradient_term import GradientTerm, Ranges
from piece_ds.zero.statistics import collect_statistics

FOLDER = "fisher"


class EWC(Baseline):
    """Online EWC: one Fisher information for all tasks so far, and one anchor, the weights that the task begins with.

    The penalty is lambda / 2 * sum of F (w - anchor)^2, with F = decay * F + F of the task. F of a task is the mean
    over its micro-batches of the squared gradient, at the weights that the task ended with. The penalty's gradient is
    added to the reduced one before norm and clip. The first task has no penalty.

    Cost: 8 bytes per trained weight of this rank while it trains (12 at ZeRO-1 in bf16); a statistics pass per task.
    Source: Kirkpatrick et al. 2017 (arXiv 1612.00796); online: Schwarz et al. 2018 (arXiv 1805.06370).
    """

    passing = (FOLDER,)
    resumes_inside = False
    changes_gradient = True

    def engine_callback(self, context: TaskContext) -> EngineCallback | None:
        # The first task has nothing to protect.
        if context.previous is None or self.settings.ewc_lambda == 0:
            return None
        return _Penalty(context.previous / FOLDER, self.settings.ewc_lambda)

    def end_task(self, engine: Any, context: TaskContext) -> None:
        """Save the Fisher information of all tasks so far, at the weights that this task ended with."""
        if context.is_last:
            return
        layout = layout_of(engine.module)
        stats = collect_statistics(engine, context.micro_batches(context.task.train), False, layout=layout)

        # Saved for the next task: earlier Fisher information, decayed, and this task's.
        fisher = stats.square_sum / stats.num_micro_batches
        if context.previous is not None:
            earlier = load_statistics(context.previous / FOLDER, layout, False, fisher.device)
            fisher += self.settings.ewc_decay * earlier.square_sum
        save_statistics(context.folder / FOLDER, GradientStats(layout, fisher, None, num_micro_batches=1))


class _Penalty(EngineCallback):
    """Adds lambda F (w - anchor) to the reduced gradient of every step."""

    def __init__(self, folder: Path, weight: float) -> None:
        super().__init__()
        self.folder, self.weight = folder, weight

    def begin(self, engine: Any) -> None:
        self.term = GradientTerm(engine)
        layout = layout_of(engine.module)
        stats = load_statistics(self.folder, layout, False, engine.device)

        # Both lie where this rank's gradients lie, so that the penalty needs no communication.
        self.fisher = self.term.ranges_of(layout, stats.square_sum)
        self.anchor = {name: (start, w.clone()) for name, (start, w) in self.term.weights().items()}
        self.remove.append(self.term.install(self._add))

    def _add(self) -> None:
        self.term.add_(penalty_gradient(self.weight, self.fisher, self.term.weights(), self.anchor))


def penalty_gradient(weight: float, fisher: Ranges, weights: Ranges, anchor: Ranges) -> Ranges:
    """Return weight * F * (w - anchor) for every parameter of fisher."""
    return {
        name: (start, weight * values.to(weights[name][1].device) * (weights[name][1] - anchor[name][1]))
        for name, (start, values) in fisher.items()
        if name in weights
    }
