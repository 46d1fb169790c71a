"""Define what one method is, in the terms by which everything else decides what it may be used with."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from piece_ds.config.piece import PieceConfig
from piece_ds.methods.baseline import Baseline
from piece_ds.methods.request import SelectionRequest
from piece_ds.selection.budget import num_selected
from piece_ds.selection.estimators import NEEDS, Estimator
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout

# (model, layout, config, task) -> how many elements will be selected; known before anything is scored.
Count = Callable[[nn.Module, Layout, PieceConfig, str], int]

SELECTION, BASELINE = "selection", "baseline"
GENERAL, GENERAL_TEXT = "general statistics", "general text"


def by_ratio(model: nn.Module, layout: Layout, config: PieceConfig, task: str) -> int:
    """Return the k of the paper: a share of the whole model."""
    return num_selected(layout, config.ratio)


@dataclass(frozen=True, kw_only=True)
class Method:
    """One method.

    Attributes:
        name: as in --method.
        help: what it does, in half a line.
        source: where the idea comes from.
        kind: SELECTION (it makes a mask) or BASELINE (it has none).
        needs: statistics that it takes: one of NEEDS, or GENERAL (those of general text beside the task's), or
            GENERAL_TEXT (general text itself).
        estimator: of a selection that is one top-k of scores. Its statistics serve any ratio and budget.
        select: of any other selection: a collective that makes the mask, with a budget of its own.
        baseline: of a method without a mask.
        count: how many elements the mask will have.
        ignores_ratio: the method decides itself how much it selects.
        needs_earlier_tasks: it selects by the masks of earlier tasks, so it has no meaning for one task.
        reads_images: proven with models that read images.
        packs: of a baseline: its batches may be rows laid end to end.
        scores_elements: of a selection by select: it scores elements, so that rows and columns can compete.
        only_linear: it acts on linear layers alone, and leaves experts out that are stacked into one parameter.
        extra: of the installation that it needs (runtime/extras.py), or ''.
    """

    name: str
    help: str
    source: str
    kind: str
    needs: str = "nothing"
    estimator: Estimator | None = None
    select: Callable[[SelectionRequest], Mask] | None = None
    baseline: type[Baseline] | None = None
    count: Count = by_ratio
    ignores_ratio: bool = False
    needs_earlier_tasks: bool = False
    reads_images: bool = True
    packs: bool = False
    scores_elements: bool = False
    only_linear: bool = False
    extra: str = ""

    def __post_init__(self) -> None:
        # A wrong entry fails at import, not in a run.
        if self.needs not in (*NEEDS, GENERAL, GENERAL_TEXT):
            raise ValueError(
                f"method {self.name!r}: needs is {self.needs!r}, expected one of {NEEDS}, {GENERAL!r}, {GENERAL_TEXT!r}"
            )
        if [self.estimator, self.select, self.baseline].count(None) != 2:
            raise ValueError(f"method {self.name!r}: give one of estimator, select and baseline")
        if (self.kind == BASELINE) != (self.baseline is not None):
            raise ValueError(f"method {self.name!r}: kind is {self.kind!r}, expected {SELECTION!r} or {BASELINE!r}")

    @property
    def has_mask(self) -> bool:
        """Whether it trains only selected weights."""
        return self.kind == SELECTION

    @property
    def has_units(self) -> bool:
        """Whether rows and columns can compete, by the mean score of their elements."""
        return self.estimator is not None or self.scores_elements

    @property
    def needs_general_text(self) -> bool:
        """Whether it selects by text that stands for general ability."""
        return self.needs in (GENERAL, GENERAL_TEXT)

    @property
    def uses_ops(self) -> bool:
        """Whether it runs this package's kernels: it has a mask, or takes statistics."""
        return self.has_mask or self.needs != "nothing"

    @property
    def changes_gradient(self) -> bool:
        """Whether it adds to the reduced gradient, which optimizer offload does not allow."""
        return self.baseline is not None and self.baseline.changes_gradient

    @property
    def trains_everything(self) -> bool:
        """Whether all eligible weights train."""
        return self.baseline is not None


def estimated(estimator: Estimator, help: str, source: str) -> Method:
    """Return the method that selects by an estimator's scores."""
    return Method(
        name=estimator.name, help=help, source=source, kind=SELECTION, needs=estimator.needs, estimator=estimator
    )
