"""What a selection may read: the engine, the task's data, and what the run knows besides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.selection.top_k import select
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.statistics import MicroBatchSource


@dataclass(frozen=True)
class SelectionOptions:
    """What some selections need and the others ignore.

    Attributes:
        task: name of the task; draws that differ from task to task depend on it.
        lift_rank: rank of LIFT's approximation; None means 1/32 of the matrix's shorter side, at least 1.
        general: called for statistics of text that stands for general ability (squares at least, owned elements).
        earlier: for each earlier task, parameter name -> ascending flat positions selected then.
    """

    task: str = ""
    lift_rank: int | None = None
    general: Callable[[], GradientStats] | None = None
    earlier: Sequence[dict[str, Tensor]] = field(default=())


@dataclass(frozen=True)
class SelectionRequest:
    """One selection on one engine.

    Attributes:
        engine: deepspeed.DeepSpeedEngine.
        micro_batches: all of the task's, the same on every rank.
        layout: of the model.
        method: name of the selection, which the mask will bear.
        ratio: selected / all elements of the model, in (0, 1].
        lam: lambda of the second-order normalization.
        seed: of what is drawn.
        device: where scores live; None means the engine's device.
        options: the rest.
    """

    engine: Any
    micro_batches: MicroBatchSource
    layout: Layout
    method: str
    ratio: float
    lam: float = 1.0
    seed: int = 42
    device: torch.device | str | None = None
    options: SelectionOptions = field(default_factory=SelectionOptions)

    @property
    def model(self) -> nn.Module:
        module: nn.Module = self.engine.module
        return module

    def mask(self, index: dict[str, Tensor], num_selected: int) -> Mask:
        """A mask of this rank's positions, under the method's name."""
        return Mask(self.layout, index, num_selected, self.method, num_selected / self.layout.total)

    def select(self, score_N: Tensor, names: set[str], budget: str) -> Mask:
        """The highest of given scores among some parameters. A collective.

        Args:
            score_N: fp32, >= 0, never NaN, laid out by Layout.owned() of the layout restricted to names.
            names: parameters that compete.
            budget: as in select().
        """
        layout = restricted(self.layout, names)
        mask = select(layout, "piece-f", self.ratio, GradientStats(layout, score_N, None), budget=budget)
        return replace(mask, layout=self.layout, method=self.method)


def restricted(layout: Layout, names: set[str]) -> Layout:
    """layout with no eligible parameters but those among names."""
    infos = (replace(info, eligible=info.eligible and info.name in names) for info in layout.parameters)
    return replace(layout, parameters=tuple(infos))
