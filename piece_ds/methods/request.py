"""Define what a selection may read: the engine, the task's data, and what the run knows besides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.config.piece import PieceConfig
from piece_ds.selection.estimators import PIECE_F
from piece_ds.selection.proposal import proposed_ratio
from piece_ds.selection.top_k import select_by
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.statistics import MicroBatchSource


@dataclass(frozen=True)
class SelectionOptions:
    """What some selections need and the others ignore.

    Attributes:
        task: name of the task; draws that differ from task to task depend on it.
        general: called for statistics of text that stands for general ability (at least squares, owned elements).
        general_batches: micro-batches of that text.
        earlier: for each earlier task, parameter name -> ascending flat positions that it selected.
    """

    task: str = ""
    general: Callable[[], GradientStats] | None = None
    general_batches: MicroBatchSource | None = None
    earlier: Sequence[dict[str, Tensor]] = field(default=())


@dataclass(frozen=True)
class SelectionRequest:
    """One selection on one engine.

    Attributes:
        engine: deepspeed.DeepSpeedEngine.
        micro_batches: all of the task's, the same on every rank.
        layout: of the model; only its eligible parameters may be selected.
        config: the method's settings.
        options: what the run knows besides.
    """

    engine: Any
    micro_batches: MicroBatchSource
    layout: Layout
    config: PieceConfig
    options: SelectionOptions = field(default_factory=SelectionOptions)

    @property
    def model(self) -> nn.Module:
        """The engine's module."""
        module: nn.Module = self.engine.module
        return module

    @property
    def method(self) -> str:
        """Name of the selection, which the mask will bear."""
        return self.config.method

    @property
    def ratio(self) -> float:
        """Selected / all elements of the model, in (0, 1]."""
        return self.config.ratio

    @property
    def device(self) -> torch.device:
        """Device of statistics and scores."""
        return torch.device("cpu" if self.config.statistics_device == "cpu" else self.engine.device)

    def mask(self, index: dict[str, Tensor], num_selected: int) -> Mask:
        """Return a mask of this rank's positions, under the method's name."""
        return Mask(self.layout, index, num_selected, self.method, num_selected / self.layout.total)

    def select(self, score_N: Tensor, names: set[str], budget: str) -> Mask:
        """Return the mask of the highest of given scores among some parameters. A collective.

        Args:
            score_N: fp32, >= 0, never NaN, laid out by Layout.owned() of the layout restricted to names.
            names: parameters that compete.
            budget: as in select_by(). What competes is the config's unit. With 'model' the mask says which ratio the
                scores propose.
        """
        layout = restricted(self.layout, names)

        # PIECE-F scores are the sums of squares themselves, so given scores can take their place.
        stats = GradientStats(layout, score_N, None)
        mask = select_by(PIECE_F, layout, self.ratio, stats=stats, budget=budget, unit=self.config.unit)
        ratio = proposed_ratio(score_N, layout) if budget == "model" else None
        return replace(mask, layout=self.layout, method=self.method, proposed_ratio=ratio)


def restricted(layout: Layout, names: set[str]) -> Layout:
    """Return layout in which only parameters among names are eligible."""
    infos = (replace(info, eligible=info.eligible and info.name in names) for info in layout.parameters)
    return replace(layout, parameters=tuple(infos))
