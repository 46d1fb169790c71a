"""Apply --forgetting_budget: scale a trained task's changes until the general text's loss rises within the budget."""

import logging
from collections.abc import Callable
from math import isfinite
from typing import Any

import datasets

from piece_ds.config.settings import Settings
from piece_ds.data.image_collate import make_collator
from piece_ds.deltas.delta import Change
from piece_ds.deltas.live import LiveDelta
from piece_ds.evaluation.forgetting_budget import search_scale
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.models.processor import Processing
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.rank_status import report_status
from piece_ds.state.mask import Mask, gather_fragments
from piece_ds.training.task_mask import TaskMask
from piece_ds.zero.weights import read_selected

logger = logging.getLogger(__name__)


def budget_of(
    settings: Settings, tokenizer: Processing, general: datasets.Dataset | None, batch_size: int
) -> Callable[[Any, TaskMask], dict[str, Any]] | None:
    """Return the function that limits a task's forgetting, given its engine and mask; None without --forgetting_budget.

    Args:
        settings: of the run.
        tokenizer: the model's, or its processor.
        general: encoded text that stands for general ability. Checked before the run to be there.
        batch_size: rows of a batch on each rank.
    """
    # Text for the search was checked before the run began.
    budget = settings.method.forgetting_budget
    if budget is None:
        return None
    assert general is not None
    collate = make_collator(tokenizer)

    def limit(engine: Any, mask: TaskMask) -> dict[str, Any]:
        report_status("searching how much of the task to keep")
        found = limit_forgetting(
            engine,
            mask,
            rows=general,
            loss=lambda rows: evaluate_loss(engine, rows, collate, batch_size, engine.device).mean,
            budget=budget,
        )
        logger.warning(
            "forgetting budget %g nats: %g of the task's change is kept; loss on the other half of the general text "
            "%.4f before, %.4f after (%.4f with the whole change)",
            budget,
            found["delta_scale"],
            *(found["report"][moment] for moment in ("before", "after", "unscaled")),
        )
        return found

    return limit


def limit_forgetting(
    engine: Any,
    mask: TaskMask,
    *,
    rows: datasets.Dataset,
    loss: Callable[[datasets.Dataset], float | None],
    budget: float,
) -> dict[str, Any]:
    """Scale the task's changes in the live model, and note the scale in mask. A collective.

    Args:
        engine: after training, with no update attached.
        mask: of the task.
        rows: general text. Every second row is searched on; the others are only reported.
        loss: of some rows, nats per token, the same on every rank.
        budget: allowed rise of the loss on the rows that are searched on, nats.
    Returns:
        JSON-ready: delta_scale, curve, and for each half of the text the loss before the task ("before"), with the kept
            change ("after") and with the whole change ("unscaled").
    Raises:
        UserError: the general text has no finite loss before the task.
    Cost: at most ten evaluations of half of the text, and a write of every selected value for each.
    """
    # Two halves: a scale that was chosen on some rows says too little about their loss.
    searched, reported = (rows.select(range(first, len(rows), 2)) for first in (0, 1))
    unscaled = read_selected(engine.module, mask.mask)
    live = LiveDelta(engine.module, _changes(engine, mask.mask, mask.previous, unscaled))

    def measure(alpha: float, text: datasets.Dataset) -> float:
        live.set_(alpha)
        found = loss(text)
        return float("nan") if found is None else found

    # Both halves, with the whole task and without it.
    whole = {"search": measure(1.0, searched), "report": measure(1.0, reported)}
    before = {"search": measure(0.0, searched), "report": measure(0.0, reported)}
    if not isfinite(before["search"]):
        raise UserError(
            f"--forgetting_budget: the general text's loss is {before['search']} before the task: give text that the "
            "model can read"
        )

    # The whole task is measured already: as a trial it costs nothing.
    curve = search_scale(
        lambda alpha: (whole["search"] if alpha == 1.0 else measure(alpha, searched), None), before["search"], budget
    )

    # What is kept, and what it costs on the half that the search has not seen.
    after = {"search": before["search"] + curve.rise, "report": measure(curve.alpha, reported)}
    mask.scale = curve.alpha
    mask.unscaled = None if curve.alpha == 1.0 else unscaled
    halves = {half: {"before": before[half], "after": after[half], "unscaled": whole[half]} for half in whole}
    return {"delta_scale": curve.alpha, "curve": curve.to_json(), **halves}


def _changes(engine: Any, mask: Mask, previous: dict[str, Any], values: dict[str, Any]) -> dict[str, Change]:
    """Return the task's whole change, on every rank. A collective. Memory: the delta's size."""
    dtypes = {name: param.dtype for name, param in engine.module.named_parameters()}

    # Each rank has read the elements it owns; a change needs all of them.
    index = mask.whole()
    before, after = (gather_fragments(mask.layout, part, dtypes) for part in (previous, values))
    return {name: Change(positions, after[name], before[name]) for name, positions in index.items()}
