"""Make a mask: estimate_mask() from an engine and data, select() from sums."""

from typing import Any

import torch
from torch import Tensor, nn

from piece_ds import ops
from piece_ds.config.piece import PieceConfig, config_of
from piece_ds.data.collate import MicroBatches
from piece_ds.methods.registry import find_estimator, find_method
from piece_ds.methods.request import SelectionOptions, SelectionRequest
from piece_ds.models.adapters import refuse_adapters
from piece_ds.models.eligible import without
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.selection.candidates import LastPassFilter
from piece_ds.selection.estimators import Estimator
from piece_ds.selection.scores import WeightReader
from piece_ds.selection.top_k import select_by
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.statistics import MicroBatchSource, StatisticsCheckpoint, collect_statistics
from piece_ds.zero.supported import require_engine
from piece_ds.zero.weights import read_weight


def estimate_mask(
    engine: Any,
    micro_batches: MicroBatchSource,
    config: PieceConfig | None = None,
    *,
    layout: Layout | None = None,
    stats: GradientStats | None = None,
    options: SelectionOptions | None = None,
    keeper: StatisticsCheckpoint | None = None,
    **settings: Any,
) -> Mask:
    """Estimate importance on data and select the most important weights of the model. A collective.

    Args:
        engine: deepspeed.DeepSpeedEngine, ZeRO 0-3.
        micro_batches: all of the task's micro-batches, the same on every rank (see MicroBatches).
        config: settings of the method; None means the defaults.
        layout: of the model; None means layout_of(engine.module).
        stats: statistics taken before; None means that they are taken now, if the method needs them.
        options: what some selections need besides (see SelectionOptions).
        keeper: as in collect_statistics().
        settings: fields of PieceConfig by name, in place of config's: method="piece-f", ratio=0.01 ...
    Returns:
        Mask; give it to attach().
    Raises:
        UserError: engine is none of DeepSpeed's, its model has an adapter of PEFT, nothing is eligible, the method is
            unknown, a setting is outside its range, a pattern of exclude names nothing, or the unit has no meaning with
            the method.
        ValueError: importance_rows is given, but micro_batches are not MicroBatches, so their rows are not known.
    Cost: of collect_statistics() and select().
    """
    # What is asked for, of which parameters and rows.
    require_engine(engine)
    refuse_adapters(engine.module, "estimate_mask()")
    config = config_of(config, settings)
    method = find_method(config.method)
    if config.unit != "element" and not method.has_units:
        raise UserError(
            f"unit {config.unit!r} has no meaning with method {method.name!r}: it does not choose by scores"
        )
    layout = without(layout or layout_of(engine.module), config.exclude)
    micro_batches = _first_rows(micro_batches, config.importance_rows)

    # A selection that is no top-k of scores does everything itself.
    if method.select is not None:
        return method.select(
            SelectionRequest(engine, micro_batches, layout, config, options=options or SelectionOptions())
        )

    # Statistics, with the candidates found while the last gradients are added.
    scorer = find_estimator(config.method)
    device = "cpu" if config.statistics_device == "cpu" else None
    candidates = None
    if stats is None and scorer.needs_statistics:
        last_pass = None
        if config.budget == "model" and config.unit == "element":
            last_pass = LastPassFilter(layout, scorer, config.ratio, config.importance_lambda)
        stats = collect_statistics(
            engine,
            micro_batches,
            needs_sum=scorer.needs_sum,
            device=device,
            layout=layout,
            last_pass=last_pass,
            keeper=keeper,
        )
        candidates = last_pass.proven() if last_pass is not None else None

    # Selection.
    params = dict(engine.module.named_parameters())

    def weight_of(name: str, start: int, numel: int) -> Tensor:
        return read_weight(params[name], start, numel)

    return _select(
        scorer,
        layout,
        config,
        stats=stats,
        weight_of=weight_of,
        candidates=candidates,
        device=device or engine.device,
    )


def select(
    layout: Layout,
    method: str = "piece-s",
    ratio: float = 0.001,
    stats: GradientStats | None = None,
    weight_of: WeightReader | None = None,
    *,
    candidates: ops.Candidates | None = None,
    device: torch.device | str | None = None,
    **settings: Any,
) -> Mask:
    """Select the highest-scoring elements of the model from statistics. A collective.

    Args:
        layout: of the model.
        method: name of an importance estimator: piece-s, piece-f, random, magnitude, or a registered one.
        ratio: selected / all elements of the model, in (0, 1].
        stats: gradient statistics, for estimators that use them.
        weight_of, candidates, device: as in select_by().
        settings: more fields of PieceConfig by name: budget, unit, importance_lambda, seed, exclude.
    Returns:
        Mask with exactly k selected elements, or at most k if rows or columns compete.
    Raises:
        ValueError: a setting is outside its range, or statistics are missing.
        UserError: nothing is eligible.
    """
    config = config_of(None, {"method": method, "ratio": ratio, **settings})
    return _select(
        find_estimator(method),
        without(layout, config.exclude),
        config,
        stats=stats,
        weight_of=weight_of,
        candidates=candidates,
        device=device,
    )


def count_selected(config: PieceConfig, model: nn.Module, task: str = "") -> int:
    """Return how many elements estimate_mask() will select in model, known before anything is scored.

    If rows or columns compete, this is the most that it will select.
    """
    layout = without(layout_of(model), config.exclude)
    return find_method(config.method).count(model, layout, config, task)


def _select(scorer: Estimator, layout: Layout, config: PieceConfig, **given: Any) -> Mask:
    return select_by(
        scorer,
        layout,
        config.ratio,
        budget=config.budget,
        unit=config.unit,
        lam=config.importance_lambda,
        seed=config.seed,
        **given,
    )


def _first_rows(micro_batches: MicroBatchSource, num_rows: int | None) -> MicroBatchSource:
    # Only MicroBatches know their rows.
    if num_rows is None:
        return micro_batches
    if not isinstance(micro_batches, MicroBatches):
        raise ValueError(
            f"importance_rows is {num_rows}, but micro_batches is a {type(micro_batches).__name__}, whose rows are not "
            "known: pass MicroBatches, or fewer micro-batches"
        )
    return micro_batches.first(num_rows)
