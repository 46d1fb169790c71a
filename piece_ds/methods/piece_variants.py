"""Go beyond PIECE: selections that also look at what the model knew before.

piece-ratio divides the task's Fisher information by that of general text, so weights that matter for general ability
are left alone. piece-s-disjoint is PIECE-S among the weights that no earlier task has trained.
"""

from dataclasses import replace

import torch
from torch import Tensor

from piece_ds.methods.request import SelectionRequest
from piece_ds.runtime.distributed import all_reduce_sum_
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import num_selected
from piece_ds.selection.estimators import PIECE_S
from piece_ds.selection.quantile import quantile_of_importance
from piece_ds.selection.top_k import select_by
from piece_ds.state.mask import Mask, collective_device
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.statistics import collect_statistics


def select_ratio(request: SelectionRequest) -> Mask:
    """Return the mask of the highest f / (g + d). f and g are mean squared gradients of the task and of general text.

    d keeps weights that neither uses from winning by a division by almost nothing. It is the median of g's entries (or
    another quantile, --damping_quantile); of those above zero if it would be 0. As an order statistic it has the same
    bits for every number of ranks.

    Raises:
        UserError: there is no general text, or it gives no gradient.
    Cost: two statistics passes (the general one is kept, see --general_statistics), 8 bytes per owned element.
    """
    stats, general = _task_and_general(request, needs_sum=False)
    f = stats.square_sum.div_(stats.num_micro_batches)
    return request.select(ratio_score(f, *general), {info.name for info in request.layout.eligible()}, "model")


def select_gain(request: SelectionRequest) -> Mask:
    """Return the mask of the highest g^2 / (h + d): g is the task's mean gradient, h general text's mean square.

    In a diagonal model this is the task's gain when each weight takes the step that is best for it. Unlike piece-ratio
    it does not count what differs between micro-batches and cancels.

    Raises:
        UserError: there is no general text, or it gives no gradient.
    Cost: as select_ratio(), and 4 bytes more per owned element.
    """
    stats, general = _task_and_general(request, needs_sum=True)
    assert stats.grad_sum is not None
    f = stats.grad_sum.div_(stats.num_micro_batches).square_()
    return request.select(ratio_score(f, *general), {info.name for info in request.layout.eligible()}, "model")


def _task_and_general(request: SelectionRequest, needs_sum: bool) -> tuple[GradientStats, tuple[Tensor, float]]:
    """Return the task's statistics, and general text's mean squares and their quantile that damps."""
    if request.options.general is None:
        raise UserError(f"--method {request.method} needs text that stands for general ability: --general_text")

    # General statistics first: if they cannot be had, no pass over the task's data is wasted.
    general = request.options.general()
    stats = collect_statistics(request.engine, request.micro_batches, needs_sum, request.device, request.layout)
    h = general.square_sum.to(stats.square_sum.device) / general.num_micro_batches
    return stats, (h, quantile_of_importance(h, request.layout, request.config.damping_quantile))


def ratio_score(f: Tensor, g: Tensor, damping: float) -> Tensor:
    """Return f / (g + damping), fp32, never NaN."""
    return (f / (g + damping)).nan_to_num_(nan=0.0, posinf=float("inf"))


def select_disjoint(request: SelectionRequest) -> Mask:
    """Return the mask of PIECE-S among the elements that are in no earlier task's mask.

    Raises:
        UserError: fewer than k elements are left.
    """
    stats = collect_statistics(request.engine, request.micro_batches, True, request.device, request.layout)
    return replace(exclude_earlier(request, stats), method=request.method)


def exclude_earlier(request: SelectionRequest, stats: GradientStats) -> Mask:
    """Return the mask of PIECE-S of stats. Entries at earlier positions are set to zero in stats.

    Raises:
        UserError: fewer than k elements are free, or have a gradient.
    """
    # Are enough elements left?
    layout, taken = request.layout, _union(request)
    k = num_selected(layout, request.ratio)
    num_taken = sum(positions.numel() for positions in taken.values())
    if layout.num_eligible - num_taken < k:
        raise UserError(
            f"--method {request.method}: {layout.num_eligible - num_taken} weights are not taken by an "
            f"earlier task, {k} are asked for: lower --mask_ratio {request.ratio}"
        )

    # A taken element has score 0.
    for info, part, offset in layout.owned():
        if info.name in taken and part.numel:
            whole = taken[info.name]
            own = whole[(whole >= part.start) & (whole < part.stop)] - part.start
            for values in stats.fragment(offset, part.numel):
                assert values is not None
                values[own.to(values.device)] = 0.0
    # A free element whose gradient is zero everywhere ties with taken ones. It is left out with them.
    num_free = int(all_reduce_sum_(_num_nonzero(stats).to(collective_device())))
    if num_free < k:
        raise UserError(
            f"--method {request.method}: {num_free} free weights have a gradient, {k} are asked for: "
            f"lower --mask_ratio {request.ratio}"
        )
    return select_by(PIECE_S, layout, request.ratio, stats=stats, lam=request.config.importance_lambda)


def _num_nonzero(stats: GradientStats) -> Tensor:
    assert stats.grad_sum is not None
    return (stats.grad_sum != 0).sum().reshape(1).cpu()


def _union(request: SelectionRequest) -> dict[str, Tensor]:
    """Return parameter name -> ascending positions that any earlier task selected."""
    # Earlier masks may hold parameters that are no longer eligible.
    eligible = {info.name for info in request.layout.eligible()}
    found: dict[str, list[Tensor]] = {}
    for index in request.options.earlier:
        for name, positions in index.items():
            if name in eligible:
                found.setdefault(name, []).append(positions.long())
    return {name: torch.cat(many).unique() for name, many in found.items()}
