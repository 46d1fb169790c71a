"""Apply --forgetting_budget: scale a trained task's changes until the general text's loss rises within the budget."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import datasets

from piece_ds.data.image_collate import make_collator
from piece_ds.deltas.delta import Change
from piece_ds.deltas.live import LiveDelta
from piece_ds.evaluation.forgetting_budget import Trial, search_scale
from piece_ds.evaluation.loss import LossResult, evaluate_loss, standard_error_of_rise
from piece_ds.models.processor import Processing
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.rank_status import report_status
from piece_ds.state.mask import Mask, gather_fragments

logger = logging.getLogger(__name__)

# Batches that a standard error is worked out of, if there are as many rows.
NUM_GROUPS = 16


class Scalable(Protocol):
    """A task's changes in the live model: LiveDelta of a mask, DenseChange of a method without one."""

    def set_(self, alpha: float) -> None:
        """Write the weights before the task plus alpha times its changes."""


@dataclass(frozen=True, kw_only=True)
class ForgettingBudget:
    """How a task's forgetting is limited.

    Attributes:
        nats: allowed rise of the loss on the rows that are searched on.
        tokenizer: the model's, or its processor.
        judged: text that stands for general ability, and that no training has seen; two rows or more.
        validated: rows of the task whose loss chooses among the scales within the budget; None takes the largest scale.
        batch_size: rows of a batch on each rank, at most.
    """

    nats: float
    tokenizer: Processing
    judged: datasets.Dataset
    validated: datasets.Dataset | None
    batch_size: int

    def limit(self, engine: Any, changes: Scalable) -> dict[str, Any]:
        """Scale a task's changes; return what limit_forgetting() found. A collective.

        Args:
            engine: after training, with no update attached.
            changes: of the task.
        """
        report_status("searching how much of the task to keep")
        collate = make_collator(self.tokenizer)

        def loss(rows: datasets.Dataset) -> LossResult:
            batch_size = max(1, min(self.batch_size, len(rows) // NUM_GROUPS))
            return evaluate_loss(engine, rows, collate, batch_size, engine.device)

        found = limit_forgetting(changes, rows=self.judged, validated=self.validated, loss=loss, budget=self.nats)
        chosen = next((t for t in found["curve"]["trials"] if t["alpha"] == found["delta_scale"]), None)
        logger.warning(
            "forgetting budget %g nats: %g of the task's change is kept%s; loss on the other half of the general text "
            "%.4f before, %.4f after (%.4f with the whole change)",
            self.nats,
            found["delta_scale"],
            "" if chosen is None else f", the rise is uncertain by {chosen['standard_error']:.4f}",
            *(found["report"][moment] for moment in ("before", "after", "unscaled")),
        )
        return found


def limit_forgetting(
    changes: Scalable,
    *,
    rows: datasets.Dataset,
    loss: Callable[[datasets.Dataset], LossResult],
    budget: float,
    validated: datasets.Dataset | None = None,
) -> dict[str, Any]:
    """Scale the task's changes in the live model. A collective.

    Args:
        changes: of the task; at the chosen scale when this returns.
        rows: general text. Every second row is searched on; the others are only reported.
        loss: of some rows, the same on every rank.
        budget: allowed rise of the loss on the rows that are searched on, with its standard error, nats.
        validated: rows of the task. Then the scale of least loss on them is chosen among those within the budget, else
            the largest.
    Returns:
        JSON-ready: delta_scale, curve, and for each half of the text the loss before the task ("before"), with the kept
            change ("after") and with the whole change ("unscaled").
    Raises:
        UserError: the general text has no finite loss before the task.
    Cost: at most ten evaluations of half of the text and six of validated, and a write of every value for each.
    """
    # Two halves: a scale that was chosen on some rows says too little about their loss.
    searched, reported = searched_half(rows), rows.select(range(1, len(rows), 2))

    def measure(alpha: float, text: datasets.Dataset) -> LossResult:
        changes.set_(alpha)
        return loss(text)

    # Both halves, with the whole task and without it.
    whole = {"search": measure(1.0, searched), "report": measure(1.0, reported)}
    before = {"search": measure(0.0, searched), "report": measure(0.0, reported)}
    if not isfinite(before["search"].mean):
        raise UserError(
            f"--forgetting_budget: the general text's loss is {before['search'].mean} before the task: give text that "
            "the model can read"
        )

    # The whole task is measured already: as a trial it costs nothing on general text.
    def trial(alpha: float) -> Trial:
        general = whole["search"] if alpha == 1.0 else measure(alpha, searched)
        score = None if validated is None else -measure(alpha, validated).mean
        return Trial(alpha, general.mean, score, standard_error_of_rise(before["search"], general))

    curve = search_scale(trial, before["search"].mean, budget)

    # What is kept, and what it costs on the half that the search has not seen.
    after = {"search": before["search"].mean + curve.rise, "report": measure(curve.alpha, reported).mean}
    halves = {half: {"before": before[half].mean, "after": after[half], "unscaled": whole[half].mean} for half in whole}
    return {"delta_scale": curve.alpha, "curve": curve.to_json(), **halves}


def searched_half(rows: datasets.Dataset) -> datasets.Dataset:
    """Return the rows of general text that a choice may look at. The others are only reported."""
    return rows.select(range(0, len(rows), 2))


def masked_change(engine: Any, mask: Mask, previous: dict[str, Any], values: dict[str, Any]) -> LiveDelta:
    """Return a masked task's whole change, on every rank. A collective. Memory: the delta's size.

    Args:
        engine: of the task.
        mask: of the task.
        previous, values: the selected weights that this rank owns, before and after the task.
    """
    dtypes = {name: param.dtype for name, param in engine.module.named_parameters()}

    # Each rank has read the elements it owns; a change needs all of them.
    index = mask.whole()
    before, after = (gather_fragments(mask.layout, part, dtypes) for part in (previous, values))
    changes = {name: Change(positions, after[name], before[name]) for name, positions in index.items()}
    return LiveDelta(engine.module, changes)
