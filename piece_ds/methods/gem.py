"""GEM: a step that would raise the loss on an earlier task's memory is turned until it does not."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from piece_ds.methods.baseline import Baseline, EngineCallback, Rows, TaskContext
from piece_ds.methods.replay import kept_rows
from piece_ds.models.layout import layout_of
from piece_ds.runtime.distributed import all_reduce_sum_
from piece_ds.state.mask import collective_device
from piece_ds.zero.gradient_term import GradientTerm, Ranges
from piece_ds.zero.statistics import collect_statistics


class GEM(Baseline):
    """Gradient episodic memory: the gradient on each earlier task's kept rows is taken anew before every step.

    Cost: per step, a forward and backward of all kept rows (--memory_ratio of every earlier task), and 4 bytes per
    trained weight and earlier task. This is inherent in the method.
    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), with all parameters as one vector.
    """

    resumes_inside = False
    changes_gradient = True

    def engine_callback(self, context: TaskContext) -> EngineCallback | None:
        if not context.earlier:
            return None
        memories = [kept_rows(task, self.settings.memory_ratio, context.seed) for task in context.earlier]
        return _Projection(context, memories, self.settings.gem_margin)


class _Projection(EngineCallback):
    """Projects the reduced gradient of every step.

    Legend: K earlier tasks.
    """

    def __init__(self, context: TaskContext, memories: list[Rows], margin: float) -> None:
        super().__init__()
        self.context, self.memories, self.margin = context, memories, margin
        self.gradients_K: list[Ranges] = []

    def begin(self, engine: Any) -> None:
        self.term, self.layout = GradientTerm(engine), layout_of(engine.module)
        self.remove.append(self.term.install(self._project))

    def before_step(self, engine: Any) -> None:
        """Take the gradient of every memory at the current weights."""
        self.gradients_K = []

        # Taken at the current weights, so they are those of this step.
        for rows in self.memories:
            batches = self.context.micro_batches(rows)
            stats = collect_statistics(engine, batches, True, layout=self.layout, description="memory")
            assert stats.grad_sum is not None
            self.gradients_K.append(self.term.ranges_of(self.layout, stats.grad_sum / stats.num_micro_batches))

    def _project(self) -> None:
        """Turn the reduced gradient if its product with some memory's gradient is negative."""
        current = self.term.gradients()
        dots_K = self._dots([(memory, current) for memory in self.gradients_K])
        if bool((dots_K >= 0).all()):
            return

        # Some product is negative: add the combination of memories that makes all of them non-negative.
        num = len(self.gradients_K)
        pairs = [(self.gradients_K[i], self.gradients_K[j]) for i in range(num) for j in range(num)]
        gram_KK = self._dots(pairs).reshape(num, num)
        for weight, memory in zip(dual_weights(gram_KK, dots_K, self.margin), self.gradients_K, strict=True):
            self.term.add_({name: (start, float(weight) * values) for name, (start, values) in memory.items()})

    def _dots(self, pairs: list[tuple[Ranges, Ranges]]) -> np.ndarray:
        """Return inner products over all ranks' elements, fp64."""
        found = torch.stack([_dot(first, second) for first, second in pairs])
        if not self.term.replicated:
            found = all_reduce_sum_(found.to(collective_device()))
        return found.cpu().numpy()


def _dot(first: Ranges, second: Ranges) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name in first.keys() & second.keys():
        total += torch.dot(first[name][1].double().cpu(), second[name][1].double().cpu())
    return total


def dual_weights(gram_KK: np.ndarray, dots_K: np.ndarray, margin: float) -> np.ndarray:
    """Return the v >= margin that minimises v' P v / 2 + q' v.

    Here P = m m' and q = m g, with the memories m and the gradient g. With margin 0, the gradient g + sum of v_k m_k is
    the one nearest to g that has no negative product with any m_k. A millionth of P's mean eigenvalue is added to its
    diagonal, so that memories in the same direction have a solution.

    Solved as non-negative least squares: with P = L L', |L' u + L^-1 (q + P margin)| over u = v - margin >= 0.

    Args:
        gram_KK: P, products of the memories' gradients.
        dots_K: q, products of each memory's gradient and the step's.
        margin: least weight of each memory.
    """
    from scipy.linalg import cholesky, solve_triangular
    from scipy.optimize import nnls

    size = len(dots_K)
    regular = gram_KK + np.eye(size) * max(float(np.trace(gram_KK)) / size * 1e-6, np.finfo(float).tiny)
    lower = cholesky(regular, lower=True)
    target = -solve_triangular(lower, dots_K + regular @ np.full(size, margin), lower=True)
    return nnls(lower.T, target)[0] + margin
