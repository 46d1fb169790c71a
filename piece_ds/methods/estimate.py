"""estimate_mask(): from an engine and data to a mask, the first of the two calls that PIECE is."""

from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.methods.registry import SELECTIONS
from piece_ds.methods.request import SelectionOptions, SelectionRequest
from piece_ds.models.layout import layout_of
from piece_ds.selection.budget import num_selected
from piece_ds.selection.candidates import LastPassFilter
from piece_ds.selection.estimators import estimator
from piece_ds.selection.top_k import select
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.statistics import MicroBatchSource, StatisticsCheckpoint, collect_statistics
from piece_ds.zero.weights import read_weight


def estimate_mask(
    engine: Any,
    micro_batches: MicroBatchSource,
    method: str = "piece-s",
    ratio: float = 0.001,
    budget: str = "model",
    lam: float = 1.0,
    seed: int = 42,
    device: torch.device | str | None = None,
    layout: Layout | None = None,
    stats: GradientStats | None = None,
    options: SelectionOptions | None = None,
    keeper: StatisticsCheckpoint | None = None,
) -> Mask:
    """Estimate importance on data and select the most important weights of the model. A collective.

    Args:
        engine: deepspeed.DeepSpeedEngine, ZeRO 0-3.
        micro_batches: all of the task's micro-batches, the same on every rank (see stream.MicroBatches).
        method: 'piece-s', 'piece-f', 'random', 'magnitude', or a name in baselines.SELECTIONS.
        ratio: selected / all elements of the model, in (0, 1].
        budget: 'model', 'layer' or 'tensor': what shares one top-k.
        lam: lambda of piece-s.
        seed: of 'random'.
        device: where statistics live; None means where gradients are, 'cpu' saves accelerator memory.
        layout: of the model; None means layout_of(engine.module).
        stats: statistics taken before; None means that they are taken now, if the method needs them.
        options: what some of baselines.SELECTIONS need; these have their own budget, and take their own statistics.
        keeper: as in collect_statistics().
    Returns:
        Mask; give it to attach().
    Cost: of collect_statistics() and select().
    """
    layout = layout or layout_of(engine.module)
    if method in SELECTIONS:
        options = options or SelectionOptions()
        return SELECTIONS[method].select(
            SelectionRequest(engine, micro_batches, layout, method, ratio, lam, seed, device, options)
        )
    scorer = estimator(method)
    candidates = None
    if stats is None and scorer.needs_squares:
        last_pass = LastPassFilter(layout, method, ratio, lam) if budget == "model" else None
        stats = collect_statistics(
            engine, micro_batches, scorer.needs_sum, device, layout, last_pass=last_pass, keeper=keeper
        )
        candidates = last_pass.proven() if last_pass is not None else None
    params = dict(engine.module.named_parameters())

    def weight_of(name: str, start: int, numel: int) -> Tensor:
        return read_weight(params[name], start, numel)

    return select(layout, method, ratio, stats, weight_of, budget, lam, seed, candidates, device or engine.device)


def count_selected(method: str, model: nn.Module, ratio: float, seed: int = 42, task: str = "") -> int:
    """How many elements estimate_mask() will select in model; known before anything is scored."""
    layout = layout_of(model)
    if method in SELECTIONS:
        return SELECTIONS[method].count(model, layout, ratio, seed, task)
    return num_selected(layout, ratio)
