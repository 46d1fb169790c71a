"""Let whole input columns or output rows of matrices compete by the mean score of their elements.

Statistics are sharded into flat row-major ranges, so a column's elements lie on several ranks. Their scores are summed
without rounding (see exact_sums), so every rank finds the same order of the same units and takes the same ones.

Legend: U units of one matrix, E entries that compete: units, and elements of what is no matrix.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.runtime.distributed import all_reduce_sum_, collective_device
from piece_ds.runtime.errors import UserError
from piece_ds.selection.exact_sums import add_, empty_sums, means
from piece_ds.selection.scores import Run, Scores, ScoreSource
from piece_ds.state.mask import gather_fragments
from piece_ds.state.partition import Layout, ParameterInfo

ELEMENT = "element"
ADDED_AT_ONCE = 1 << 20  # scores: 64 MiB while they are added


@dataclass(frozen=True)
class Units:
    """How one matrix is divided into units.

    Attributes:
        width: elements of a stored row.
        along_last: whether a unit is a stored column (its elements are `width` apart); if not, a stored row.
        count: number of units.
        size: elements of each.
    """

    width: int
    along_last: bool
    count: int
    size: int

    def of(self, position: Tensor) -> Tensor:
        """Return the unit of each flat row-major position."""
        return position % self.width if self.along_last else position // self.width

    def positions(self, taken: Tensor, start: int, stop: int) -> Tensor:
        """Return the ascending flat positions in [start, stop) of the taken units (ascending, int64)."""
        if self.along_last:
            rows = torch.arange(start // self.width, -(-stop // self.width))
            found = (rows.unsqueeze(1) * self.width + taken).view(-1)
        else:
            found = (taken.unsqueeze(1) * self.width + torch.arange(self.width)).view(-1)
        return found[(found >= start) & (found < stop)]


def units_of(info: ParameterInfo, unit: str) -> Units | None:
    """Return the units of a matrix; None for a parameter that competes by element.

    A matrix of which only some rows may be selected does: whole columns of it may not be.
    """
    if unit == ELEMENT or len(info.shape) != 2 or info.numel == 0 or info.rows is not None:
        return None
    height, width = info.shape
    along_last = (unit == "column") != info.in_first
    return Units(width, along_last, *((width, height) if along_last else (height, width)))


def element_budget(
    layout: Layout, group_of: dict[str, int], num_to_take: list[int], unit: str
) -> tuple[dict[str, int], list[int]]:
    """Return (group_of, num_to_take) of the elements that compete as such, groups without any left out.

    No more than these can be taken, even if no unit is.
    """
    numel: dict[int, int] = {}
    names = []
    for info in layout.eligible():
        if info.name in group_of and info.numel and units_of(info, unit) is None:
            group = group_of[info.name]
            numel[group] = numel.get(group, 0) + info.selectable.numel
            names.append(info.name)
    groups = {group: place for place, group in enumerate(numel)}
    return {name: groups[group_of[name]] for name in names}, [min(num_to_take[g], numel[g]) for g in numel]


def select_units(
    source: ScoreSource, num_to_take: list[int], unit: str, elements: dict[str, Tensor]
) -> tuple[dict[str, Tensor], int]:
    """Take units in order of score while no more than k elements are selected. A collective.

    The order is: mean score, descending; then parameters in the order of named_parameters(); then the unit's or the
    element's place in its parameter. A group is full at the first unit that would exceed its k. Nothing after it is
    taken.

    Args:
        source: the scores and the groups.
        num_to_take: k of each group.
        unit: 'row' or 'column'.
        elements: the k best elements of what is no matrix, as element_budget() has them: this rank's positions.
    Returns:
        (parameter name -> ascending positions on this rank, elements selected over all ranks).
    Raises:
        UserError: the first unit of every group has more elements than its k.
    Cost: one pass over the scores, with two additions each. 88 bytes per unit of the model are all-reduced. 12 bytes
    per element of `elements` are gathered on every rank, and both are sorted there.
    """
    layout, group_of = source.layout, source.group_of
    cuts = {info.name: units_of(info, unit) for info in layout.eligible() if info.name in group_of}
    matrices = {name: cut for name, cut in cuts.items() if cut is not None}

    # Everything that competes, the same on every rank.
    mean_of = _unit_means(source, matrices)
    place_of = {name: torch.arange(cut.count) for name, cut in matrices.items()}
    dtypes = dict.fromkeys(layout.shapes(), torch.int64)
    place_of |= gather_fragments(layout, elements, dtypes)
    scores = gather_fragments(layout, _scores_at(source, elements), dict.fromkeys(dtypes, torch.float32))
    mean_of |= {name: values.double().numpy() for name, values in scores.items()}

    # The first of each group whose sizes add up to no more than its k.
    names = [name for name in layout.shapes() if name in place_of]
    counts = [place_of[name].numel() for name in names]
    parameter_E = np.repeat(np.arange(len(names)), counts)
    group_E = np.repeat([group_of[name] for name in names], counts)
    size_E = np.repeat([matrices[name].size if name in matrices else 1 for name in names], counts)
    mean_E = np.concatenate([mean_of[name] for name in names])
    order_E = np.lexsort((-mean_E, group_E))  # stable: equal ones stay in the order of parameter and place
    is_taken_E = np.zeros(len(order_E), dtype=bool)
    is_taken_E[order_E] = _fits(group_E[order_E], size_E[order_E], np.array(num_to_take))
    num_selected = int(size_E[is_taken_E].sum())
    if num_selected == 0:
        first = order_E[0]
        raise UserError(
            f"unit {unit!r}: the first {unit} in order of score, of {names[parameter_E[first]]!r}, has "
            f"{size_E[first]} elements, and only {num_to_take[group_E[first]]} may be selected: raise the ratio "
            "(--mask_ratio), or select by element (--unit element)"
        )

    # What of it lies on this rank.
    index = {}
    parts = np.split(is_taken_E, np.cumsum(counts)[:-1])
    taken_of = {name: place_of[name][torch.from_numpy(part)] for name, part in zip(names, parts, strict=True)}
    for info, part, _ in layout.owned():
        taken = taken_of.get(info.name)
        if taken is None or not part.numel:
            continue
        cut = matrices.get(info.name)
        inside = taken[(taken >= part.start) & (taken < part.stop)] if cut is None else None
        found = cut.positions(taken, part.start, part.stop) if cut is not None else inside
        if found is not None and found.numel():
            index[info.name] = found
    return index, num_selected


def _fits(group_E: np.ndarray, size_E: np.ndarray, k_G: np.ndarray) -> np.ndarray:
    """Return which entries, in order within each group, are taken before the group's k would be exceeded."""
    total_E = np.cumsum(size_E)
    first_G = np.searchsorted(group_E, np.arange(len(k_G)))
    before_G = np.concatenate([[0], total_E])[first_G]
    fits: np.ndarray = total_E - before_G[group_E] <= k_G[group_E]
    return fits


def _unit_means(source: ScoreSource, matrices: dict[str, Units]) -> dict[str, np.ndarray]:
    """Return matrix name -> fp64 mean score of each unit, on every rank. A collective."""
    # One row of sums a unit, those of each matrix side by side.
    starts, total = {}, 0
    for name, cut in matrices.items():
        starts[name] = total
        total += cut.count
    sums_UD = empty_sums(total, source.device)
    for run in source():
        if run.name not in matrices:
            continue
        first = int(run.position)
        for begin in range(0, run.scores.numel, ADDED_AT_ONCE):
            score_N = _score(run.scores.part(begin, begin + ADDED_AT_ONCE))
            position_N = torch.arange(score_N.numel(), device=score_N.device) + (first + begin)
            add_(sums_UD, score_N, matrices[run.name].of(position_N) + starts[run.name])
    whole_UD = all_reduce_sum_(sums_UD.to(collective_device()))
    return {name: means(whole_UD[starts[name] : starts[name] + cut.count], cut.size) for name, cut in matrices.items()}


def _scores_at(source: ScoreSource, index: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return parameter name -> scores (fp32, CPU) of this rank's elements at ascending positions."""
    found: dict[str, list[Tensor]] = {}
    for run in source():
        if run.name in index:
            found.setdefault(run.name, []).append(_scores_of_run(run, index[run.name]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _scores_of_run(run: Run, position: Tensor) -> Tensor:
    first = int(run.position)
    low, high = torch.searchsorted(position, torch.tensor([first, first + run.scores.numel])).tolist()
    element = (position[low:high] - first).to(run.scores.square_sum.device)
    grad_sum = None if run.scores.grad_sum is None else run.scores.grad_sum[element]
    return _score(Scores(grad_sum, run.scores.square_sum[element], run.scores.lam)).cpu()


def _score(scores: Scores) -> Tensor:
    return ops.score(*scores)
