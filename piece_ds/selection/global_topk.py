"""The mask of exactly k elements with the highest scores of the whole model, over all ranks.

The selection is a set, so it is exact: the same scores give the same mask for every number of ranks, and ties go to
the smaller (parameter in named_parameters() order, flat row-major index).
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from piece_ds.importance import Estimator, Fragment
from piece_ds.importance.registry import estimator
from piece_ds.selection.budget import budget_groups
from piece_ds.selection.threshold import find_thresholds, tie_quotas
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout, ParameterInfo, Partition
from piece_ds.state.statistics import GradientStats

CHUNK = 1 << 22  # scores alive at a time: 16 MiB

WeightReader = Callable[[str, int, int], Tensor]


def select(
    layout: Layout,
    method: str,
    ratio: float,
    stats: GradientStats | None = None,
    weight_of: WeightReader | None = None,
    budget: str = "model",
    lam: float = 1.0,
    seed: int = 0,
) -> Mask:
    """Select the highest-scoring elements of the model. A collective: every rank calls it.

    Args:
        layout: of the model; scores exist for its eligible elements only.
        method: an importance estimator's name.
        ratio: selected / all elements of the model, in (0, 1]; see budget_groups for k.
        stats: gradient statistics, for methods that use them.
        weight_of: (name, start, numel) -> current values of elements this rank owns, for methods that use them.
        budget: 'model' (one top-k), 'layer' or 'tensor'.
        lam: lambda of piece-s.
        seed: of `random`.
    Returns:
        Mask with exactly k selected elements.
    Raises:
        ValueError: method needs statistics that are not there, or nothing is eligible.
    Cost: computes every owned score four times, in chunks of 16 MiB; communicates counts only.
    """
    scorer = estimator(method)
    if scorer.needs_squares and (stats is None or (scorer.needs_sum and stats.grad_sum is None)):
        raise ValueError(f"method {method!r} needs gradient statistics with "
                         f"{'sum and ' if scorer.needs_sum else ''}square sum: collect them first")  # fmt: skip
    groups = budget_groups(layout, ratio, budget)
    group_of = {name: group for group, (names, _) in enumerate(groups) for name in names}
    device = stats.square_sum.device if stats is not None else torch.device("cpu")
    source = _Scores(layout, scorer, stats, weight_of, device, lam, seed)

    def chunks() -> Iterator[tuple[int, Tensor]]:
        for info, part, offset in layout.owned():
            if info.name in group_of:
                for _, score in source.of(info, part, offset):
                    yield group_of[info.name], score

    thresholds = find_thresholds(chunks, [k for _, k in groups], device)
    index = {}
    above, ties = _scan(layout, source, {name: thresholds[group].key for name, group in group_of.items()})
    names = [info.name for info in layout.eligible() if info.name in group_of]
    num_ties = torch.tensor([ties[name].numel() for name in names])
    quotas = tie_quotas(num_ties, [group_of[name] for name in names], thresholds, layout.rank)
    for name, quota in zip(names, quotas, strict=True):
        positions = torch.cat([above[name], ties[name][:quota]]).sort().values
        if positions.numel():
            index[name] = positions
    return Mask(layout, index, sum(k for _, k in groups), method, ratio)


class _Scores:
    """Scores of this rank's elements, recomputed on demand chunk by chunk, so that none is ever stored."""

    def __init__(
        self,
        layout: Layout,
        scorer: Estimator,
        stats: GradientStats | None,
        weight_of: WeightReader | None,
        device: torch.device,
        lam: float,
        seed: int,
    ) -> None:
        self.parameter_index = {info.name: i for i, info in enumerate(layout.parameters)}
        self.scorer, self.stats, self.weight_of = scorer, stats, weight_of
        self.device, self.lam, self.seed = device, lam, seed

    def of(self, info: ParameterInfo, part: Partition, offset: int) -> Iterator[tuple[int, Tensor]]:
        """(flat index of the first element, scores) for each chunk of one parameter's range."""
        for begin in range(0, part.numel, CHUNK):
            numel = min(CHUNK, part.numel - begin)
            start = part.start + begin
            grad_sum, square_sum = self.stats.fragment(offset + begin, numel) if self.stats else (None, None)
            yield (
                start,
                self.scorer.score(
                    Fragment(
                        parameter_index=self.parameter_index[info.name],
                        start=start,
                        numel=numel,
                        device=self.device,
                        square_sum=square_sum,
                        grad_sum=grad_sum,
                        weight=partial(self._weight, info.name, start, numel),
                        lam=self.lam,
                        seed=self.seed,
                    )
                ),
            )

    def _weight(self, name: str, start: int, numel: int) -> Tensor:
        if self.weight_of is None:
            raise ValueError(f"this method scores weights, but no reader of {name!r} was given: pass weight_of")
        return self.weight_of(name, start, numel).to(torch.float32)


def _scan(layout: Layout, source: _Scores, key_of: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ascending positions strictly above, and exactly at, the key of each parameter in key_of (CPU, int64)."""
    above, ties = {}, {}
    for info, part, offset in layout.owned():
        if info.name not in key_of:
            continue
        greater, equal = [torch.zeros(0).long()], [torch.zeros(0).long()]
        for start, score in source.of(info, part, offset):
            key = score.view(torch.int32)
            greater.append((key > key_of[info.name]).nonzero().squeeze(1).cpu() + start)
            equal.append((key == key_of[info.name]).nonzero().squeeze(1).cpu() + start)
        above[info.name], ties[info.name] = torch.cat(greater), torch.cat(equal)
    return above, ties
