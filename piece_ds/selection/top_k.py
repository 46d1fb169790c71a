"""Make the mask of exactly k elements with the highest scores of the whole model, over all ranks.

The selection is a set, so it is exact: the same scores give the same mask for every number of ranks. Ties go to the
smaller (parameter in named_parameters() order, flat row-major index).
"""

from dataclasses import replace

import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.selection.alone import decides_alone, first_in_order, fragments
from piece_ds.selection.budget import budget_groups
from piece_ds.selection.candidates import candidate_runs, find_candidates, runs_of
from piece_ds.selection.estimators import Estimator
from piece_ds.selection.scores import Runs, ScoreSource, WeightReader
from piece_ds.selection.threshold import Threshold, find_thresholds, tie_quotas
from piece_ds.selection.units import ELEMENT, element_budget, select_units
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats


def select_by(
    scorer: Estimator,
    layout: Layout,
    ratio: float,
    *,
    stats: GradientStats | None = None,
    weight_of: WeightReader | None = None,
    budget: str = "model",
    unit: str = ELEMENT,
    lam: float = 1.0,
    seed: int = 42,
    candidates: ops.Candidates | None = None,
    device: torch.device | str | None = None,
) -> Mask:
    """Select the highest-scoring elements of the model. A collective: every rank calls it.

    Args:
        scorer: an importance estimator.
        layout: of the model; only its eligible elements have scores.
        ratio: selected / all elements of the model, in (0, 1]; see budget_groups for k.
        stats: gradient statistics, for estimators that use them.
        weight_of: (name, start, numel) -> current values of elements this rank owns, for estimators that use them.
        budget: 'model' (one top-k), 'layer' or 'tensor'.
        unit: what competes: 'element', 'row' or 'column' (see select_units()).
        lam: lambda of piece-s.
        seed: of `random`.
        candidates: elements proven to contain the selection (see LastPassFilter), which saves the pass over stats.
        device: on which estimators without statistics compute. None means the device of stats, else the CPU.
    Returns:
        Mask with exactly k selected elements; with rows or columns, with those that fit into k.
    Raises:
        ValueError: the estimator needs statistics that are missing.
        UserError: nothing is eligible.
    Cost: one pass over the statistics, none with candidates. Up to eight if more scores tie, or share their leading
    digit, than there is room for. Room: 12 bytes for each of 4 k candidates. Only counts are communicated. One rank on
    a GPU waits for it three times: for the bound, the number of candidates, and the positions.
    """
    if scorer.needs_statistics and (stats is None or (scorer.needs_sum and stats.grad_sum is None)):
        raise ValueError(
            f"method {scorer.name!r} needs gradient statistics with "
            f"{'sum and ' if scorer.needs_sum else ''}square sum: collect them first"
        )

    # Who competes with whom, and by which scores.
    groups = budget_groups(layout, ratio, budget)
    num_to_take = [k for _, k in groups]
    group_of = {name: group for group, (names, _) in enumerate(groups) for name in names}
    device = stats.square_sum.device if stats is not None else torch.device(device or "cpu")
    source = ScoreSource(layout, group_of, scorer, stats, weight_of, device, lam, seed)

    # Elements compete.
    if unit == ELEMENT:
        index = _select_elements(source, num_to_take, candidates)
        return Mask(layout, index, sum(num_to_take), scorer.name, ratio)

    # Rows or columns compete, and single elements of what is no matrix.
    single_of, num_single = element_budget(layout, group_of, num_to_take, unit)
    elements = _select_elements(replace(source, group_of=single_of), num_single) if num_single else {}
    index, num_selected = select_units(source, num_to_take, unit, elements)
    return Mask(layout, index, num_selected, scorer.name, ratio)


def _select_elements(
    source: ScoreSource, num_to_take: list[int], candidates: ops.Candidates | None = None
) -> dict[str, Tensor]:
    """Return this rank's positions of the k highest scores of each group, ascending. A collective."""
    layout, device, group_of = source.layout, source.device, source.group_of

    # Few elements that must contain the selection.
    candidates = candidates or find_candidates(source.spans, num_to_take, layout, device)
    if candidates is not None and decides_alone(layout, device):
        return fragments(first_in_order(candidates, layout, group_of, num_to_take), layout)

    # Several ranks: only counts cross, digit by digit.
    runs: Runs = source if candidates is None else runs_of(candidate_runs(candidates, layout, group_of))
    thresholds = find_thresholds(runs, num_to_take, device)
    names = [info.name for info in layout.eligible() if info.name in group_of]
    return _take(runs, thresholds, names, group_of, layout.rank, device)


def _take(
    runs: Runs,
    thresholds: list[Threshold],
    names: list[str],
    group_of: dict[str, int],
    owner: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return ascending positions of what is above its group's threshold, and of this rank's share of the ties.

    Legend: R runs, P parameters.
    """
    # Count each run's elements at the threshold; the host reads all counts at once.
    row_of = {name: row for row, name in enumerate(names)}
    row_R = []
    count_R = [torch.zeros(0, dtype=torch.int64, device=device)]
    for run in runs():
        row_R.append(row_of[run.name])
        count_R.append(torch.zeros(1, dtype=torch.int64, device=device))
        ops.score_histogram_(count_R[-1], *run.scores, shift=0, bits=0, prefix=thresholds[run.group].key)
    ties_R = torch.cat(count_R).cpu()
    ties_P = torch.zeros(len(names), dtype=torch.int64).index_add_(0, torch.tensor(row_R, dtype=torch.int64), ties_R)

    # Which of them belong to the selection.
    left = dict(zip(names, tie_quotas(ties_P, [group_of[name] for name in names], thresholds, owner), strict=True))

    # The positions.
    found: dict[str, list[Tensor]] = {}
    for run, count in zip(runs(), ties_R.tolist(), strict=True):
        quota = min(count, left[run.name])
        left[run.name] -= quota
        element = ops.select_above(*run.scores, thresholds[run.group].key, quota)
        if element.numel():
            found.setdefault(run.name, []).append(run.positions(element))
    return {name: torch.cat(found[name]) for name in names if name in found}
