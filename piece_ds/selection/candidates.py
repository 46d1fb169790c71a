"""Find candidates: few elements that are proven to contain the selection, in one pass over the scores or in none.

A sample gives a lower bound of the k-th score. One pass keeps what reaches it, about 1.5 k elements. The counts over
all ranks prove that these are enough. A bound that was too high or too low costs time, never exactness: then the
leading digits of all scores give a bound that is certain.

Legend: G budget groups, D digits.
"""

import logging
import math
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.runtime.distributed import all_reduce_sum_, world_size
from piece_ds.selection.budget import num_selected
from piece_ds.selection.estimators import Estimator
from piece_ds.selection.scores import Run, Runs, Scores, ScoreSource
from piece_ds.selection.threshold import DIGITS, digit_counts, digits_of_kth
from piece_ds.state.mask import collective_device
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats


class LastPassFilter:
    """Filter the new sums in the same pass that writes them, by a bound sampled from the earlier sums.

    Only for one top-k of the whole model. The bound is a guess, since scores still change; proven() says whether it
    held.
    """

    def __init__(self, layout: Layout, scorer: Estimator, ratio: float, lam: float) -> None:
        """Keep what selection will ask for.

        Args:
            layout: of the model.
            scorer: filters only if its scores come from the sums.
            ratio, lam: as in select_by().
        """
        self.layout = layout
        self.scorer = scorer
        self.k = num_selected(layout, ratio)
        self.lam = lam
        self.bound = 0.0
        self.candidates: ops.Candidates | None = None

    def begin(self, stats: GradientStats) -> None:
        """Sample the bound: the next gradients are the last ones. A collective.

        Args:
            stats: sums of everything before.
        """
        if not self.scorer.from_sums or self.scorer.needs_sum != (stats.grad_sum is not None):
            return  # the pass could not compute this score
        device = stats.square_sum.device
        group_of = {info.name: 0 for info in self.layout.eligible()}
        source = ScoreSource(self.layout, group_of, self.scorer, stats, None, device, self.lam, seed=0)
        self.bound = sampled_bound(source.spans, self.k, self.layout.num_eligible, device)
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
        """Add an element's last gradient as ops.accumulate_() does, and filter it if there is a bound.

        Args:
            grad, grad_sum, square_sum, scale, num_nonfinite: as in ops.accumulate_().
            offset: place of the first element in the flat buffer.
        """
        if self.candidates is None:
            ops.accumulate_(grad, grad_sum, square_sum, scale, num_nonfinite)
        else:
            ops.accumulate_filter_(
                grad, grad_sum, square_sum, scale, num_nonfinite, self.lam, self.bound, offset, self.candidates
            )

    def proven(self) -> ops.Candidates | None:
        """Return proven() of what the last pass found, or None without a bound. A collective."""
        return None if self.candidates is None else proven(self.candidates, self.k)


logger = logging.getLogger(__name__)

# A sample is 4 KiB in every 256 KiB: whole pages, 1/64 of the bytes. With fewer than SAMPLE_FROM elements all are read.
SAMPLE_RUN, SAMPLE_STRIDE, SAMPLE_FROM = 1 << 10, 1 << 16, 1 << 22
# Its keys are counted by 15 bits: exponent and 7 mantissa bits, so that a bin is 1 % wide.
SAMPLE_SHIFT, SAMPLE_BITS = 16, 15


def room_for(k: int, num_owned: int) -> int:
    """Return the number of candidates that a rank has room for.

    One rank may own all of them, and a bound may be too low by half.
    """
    return min(num_owned, 4 * k + (1 << 16))


def sampled_bound(runs: Runs, k: int, num_elements: int, device: torch.device) -> float:
    """Return a score that k elements or a few more of a single group probably reach, over all ranks.

    Args:
        runs: this rank's scores.
        k: of the group.
        num_elements: of the group, over all ranks.
        device: of the scores.
    Cost: reads 1/64 of the scores; all-reduces 256 KiB; the host waits once, for one number.
    """
    # Count the keys of a sample.
    is_whole = num_elements < SAMPLE_FROM
    run, stride = (1, 1) if is_whole else (SAMPLE_RUN, SAMPLE_STRIDE)
    counts_D = torch.zeros(1 << SAMPLE_BITS, dtype=torch.int64, device=device)
    for part in runs():
        begin = -part.offset % stride  # samples lie at multiples of stride in the flat buffer
        if begin < part.scores.numel:
            ops.score_histogram_(counts_D, *part.scores.part(begin), SAMPLE_SHIFT, SAMPLE_BITS, 0, run, stride)
    if world_size() > 1:
        counts_D = all_reduce_sum_(counts_D.to(collective_device()))

    # Find the score that enough of the sample reach.
    expected = k * run / stride
    # Half as many again, or six standard deviations of a count if those are more.
    wanted = k if is_whole else math.ceil(max(1.5 * expected, expected + 6 * math.sqrt(expected) + 8))
    # That many digits, counted from the greatest, are too few elements. One number goes to the host.
    num_above = int((counts_D.flip(0).cumsum(0) < wanted).sum())
    digit = max((1 << SAMPLE_BITS) - 1 - num_above, 0)
    return _score_of(digit << SAMPLE_SHIFT)


def certain_bounds(runs: Runs, num_to_take: list[int], device: torch.device) -> list[float]:
    """Return, for each group, the smallest score with the k-th score's leading digit. At least k elements reach it."""
    shift, bits = DIGITS[0]
    counts_GD = digit_counts(runs(), shift, bits, [0] * len(num_to_take), device)
    return [_score_of(digit << shift) for digit, _ in digits_of_kth(counts_GD, num_to_take)]


def find_candidates(runs: Runs, num_to_take: list[int], layout: Layout, device: torch.device) -> ops.Candidates | None:
    """Return elements of this rank among which the selection of every group must be, or None if there are too many.

    Args:
        runs: as in find_thresholds(); names are not looked at.
        num_to_take: k of each group.
        layout: of the model.
        device: of the scores.
    Cost: one pass over the scores; three if the sample misled, or if there are several groups.
    """
    # A guess first: with one group it is usually right.
    if len(num_to_take) == 1:
        bound = sampled_bound(runs, num_to_take[0], layout.num_eligible, device)
        candidates = proven(_collect(runs, [bound], num_to_take, layout, device), num_to_take[0])
        if candidates is not None:
            return candidates
        logger.info("the sampled bound %g did not prove enough candidates: all scores are counted", bound)

    # Otherwise a bound that is certain. It may still let in too many.
    candidates = _collect(runs, certain_bounds(runs, num_to_take, device), num_to_take, layout, device)
    return proven(candidates, sum(num_to_take))


def _collect(
    runs: Runs, bounds: list[float], num_to_take: list[int], layout: Layout, device: torch.device
) -> ops.Candidates:
    candidates = ops.empty_candidates(room_for(sum(num_to_take), layout.num_owned), device)
    for run in runs():
        ops.filter_(*run.scores, bounds[run.group], run.offset, candidates)
    return candidates


def proven(candidates: ops.Candidates, k: int) -> ops.Candidates | None:
    """Return candidates without their empty room if they must contain the selection, else None. A collective.

    They must if at least k elements over all ranks reached the bound and every one of them had room.

    Cost: the host waits once.
    """
    # All counts come to the host in one copy.
    found, capacity = candidates.num_found, candidates.capacity
    if world_size() == 1:
        count = total = int(found)
        num_overflowed = int(count > capacity)
    else:
        all_found = all_reduce_sum_(torch.cat([found, found > capacity]).to(collective_device()))
        count, total, num_overflowed = torch.cat([found.to(all_found.device), all_found]).tolist()
    if total < k or num_overflowed > 0:
        return None
    return ops.Candidates(candidates.score[:count], candidates.index[:count], found)


def candidate_runs(candidates: ops.Candidates, layout: Layout, group_of: dict[str, int]) -> list[Run]:
    """Return proven candidates as runs, one per parameter, in ascending order of position."""
    score, index = _ascending(candidates.score, candidates.index)
    owned = [(info, part, offset) for info, part, offset in layout.owned() if info.name in group_of]
    borders = torch.tensor([[offset, offset + part.numel] for _, part, offset in owned], device=index.device)
    cuts = torch.searchsorted(index, borders).tolist()
    return [
        Run(info.name, group_of[info.name], Scores(None, score[a:b]), offset, index[a:b] + (part.start - offset))
        for (info, part, offset), (a, b) in zip(owned, cuts, strict=True)
    ]


def _ascending(score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in ascending order of index. Providers on the CPU find candidates in this order already."""
    if bool((index.diff() > 0).all()):
        return score, index
    order = index.argsort()
    return score[order], index[order]


def _score_of(key: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", key))[0]
    return value


def runs_of(runs: list[Run]) -> Runs:
    """Return a list of runs as a function that can be called again for every pass."""

    def again() -> Iterator[Run]:
        return iter(runs)

    return again
