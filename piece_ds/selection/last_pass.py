"""Candidates found while the last gradients are added, so that selection reads the sums not even once more."""

from torch import Tensor

from piece_ds import ops
from piece_ds.importance import estimator
from piece_ds.selection.budget import num_selected
from piece_ds.selection.candidates import are_proven, room_for, sampled_bound
from piece_ds.selection.runs import ScoreSource
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats


class LastPassFilter:
    """Filters the new sums in the same pass that writes them, by a bound sampled from the sums before.

    One top-k of the whole model only. The bound is a guess, as scores still move; proven() says whether it was right.
    """

    def __init__(self, layout: Layout, method: str, ratio: float, lam: float) -> None:
        """
        Args:
            layout: of the model.
            method: an estimator whose scores come from the sums.
            ratio, lam: as in select().
        """
        self.layout = layout
        self.scorer = estimator(method)
        self.k = num_selected(layout, ratio)
        self.lam = lam
        self.bound = 0.0
        self.candidates: ops.Candidates | None = None

    def begin(self, stats: GradientStats) -> None:
        """The next gradients are the last ones. A collective.

        Args:
            stats: sums of everything before.
        """
        if not self.scorer.from_sums or self.scorer.needs_sum != (stats.grad_sum is not None):
            return  # the pass could not compute this score
        device = stats.square_sum.device
        group_of = {info.name: 0 for info in self.layout.eligible()}
        runs = ScoreSource(self.layout, group_of, self.scorer, stats, None, device, self.lam, seed=0)
        self.bound = sampled_bound(runs, self.k, self.layout.num_eligible, device)
        if self.bound > 0.0:  # every score reaches 0: that would be a list of everything
            self.candidates = ops.empty_candidates(room_for(self.k, self.layout.num_owned), device)

    def accumulate_(
        self,
        grad: Tensor,
        grad_sum: Tensor | None,
        square_sum: Tensor,
        scale: float,
        num_nonfinite: Tensor,
        offset: int,
    ) -> None:
        """ops.accumulate_() of an element's last gradient, whose place in the flat buffer is offset."""
        if self.candidates is None:
            ops.accumulate_(grad, grad_sum, square_sum, scale, num_nonfinite)
        else:
            ops.accumulate_filter_(
                grad, grad_sum, square_sum, scale, num_nonfinite, self.lam, self.bound, offset, self.candidates
            )

    def proven(self) -> ops.Candidates | None:
        """The candidates, if they are known to contain the selection. A collective."""
        if self.candidates is None or not are_proven(self.candidates, self.k):
            return None
        return self.candidates
