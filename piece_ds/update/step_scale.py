"""Scale steps by general importance: weights that matter for general ability move less, and none is frozen.

The optimizer's update of weight i is multiplied by sqrt(d / (F_i + d)). F is the mean squared gradient of text that
stands for general ability, and d its median or another quantile. Moments, norm and clip are of the unscaled gradient;
weight decay is not scaled. A weight that general text does not use moves at the full rate, one of importance d at 0.71
of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ds.runtime.errors import UserError
from piece_ds.selection.quantile import quantile_of_importance
from piece_ds.state.mask import Mask, gather_fragments
from piece_ds.state.partition import Layout
from piece_ds.state.selected_values import selected_values
from piece_ds.state.statistics import GradientStats
from piece_ds.update.decay import SelectedDecay
from piece_ds.zero.scaled_update import scale_all
from piece_ds.zero.supported import adapter_for, require_trainable


@dataclass(frozen=True)
class StepScale:
    """A factor in [0, 1] on the optimizer's update of each eligible weight; every other weight keeps 1.

    Attributes:
        layout: of the model, and of this rank's share.
        factor_N: fp32, laid out by layout.owned().
        damping: d.
    """

    layout: Layout
    factor_N: Tensor
    damping: float

    def selected(self, mask: Mask) -> dict[str, Tensor]:
        """Return parameter name -> a factor for each position of mask.whole(), on the CPU, on every rank. A collective.

        Raises:
            UserError: the mask is of another model or another number of ranks.
        Cost: 4 bytes received for each selected element.
        """
        self._require(mask.layout)

        # Elements that are not eligible here keep the factor 1.
        fragments = {name: torch.ones(index.numel()) for name, index in mask.index.items()}
        for info, part, offset in self.layout.owned():
            if info.name in mask.index:
                own = self.factor_N[offset : offset + part.numel]
                place = mask.index[info.name] - part.start
                known = (place >= 0) & (place < part.numel)
                fragments[info.name][known] = own[place[known].to(own.device)].cpu()
        return gather_fragments(mask.layout, fragments, dict.fromkeys(mask.layout.shapes(), torch.float32))

    def _require(self, layout: Layout) -> None:
        if layout.shapes() != self.layout.shapes():
            raise UserError("the step scale is of another model than the mask: take both from this engine's model")
        if (layout.rank, layout.num_ranks) != (self.layout.rank, self.layout.num_ranks):
            raise UserError(
                f"the step scale was made for {self.layout.num_ranks} ranks, the mask for {layout.num_ranks}: "
                "make it from general statistics of this number of ranks"
            )


def general_step_scale(general: GradientStats, quantile: float = 0.5) -> StepScale:
    """Return the factors sqrt(d / (F + d)) of general statistics. A collective.

    Args:
        general: of text that stands for general ability; its squares are read, not changed.
        quantile: of F that is d; 0.5 is the median.
    Raises:
        UserError: the text gives no gradient.
    Cost: 4 bytes per owned element, on the statistics' device.
    """
    mean_square = general.square_sum / general.num_micro_batches
    damping = quantile_of_importance(mean_square, general.layout, quantile)
    return StepScale(general.layout, (damping / mean_square.add_(damping)).sqrt_(), damping)


class ScaledSteps:
    """A step scale in force on an engine without a mask. `detach()` removes it."""

    def __init__(self, engine: Any, step_scale: StepScale) -> None:
        adapter = adapter_for(engine)
        optimizer = engine.basic_optimizer
        decay = SelectedDecay(adapter, None)
        update = scale_all(adapter, step_scale.layout, step_scale.factor_N)

        # Decay first: ScaledUpdate must not scale it.
        self._remove = [*decay.install(optimizer), *update.install(optimizer)]

    def detach(self) -> None:
        """Restore the engine as it was before."""
        for remove in self._remove:
            remove()
        self._remove = []


def scale_steps(engine: Any, step_scale: StepScale) -> ScaledSteps:
    """Make engine.step() multiply its update of every weight by that weight's factor. A collective.

    For an engine that trains all of a model. With a mask, attach(engine, mask, step_scale=...) does it.

    Args:
        engine: deepspeed.DeepSpeedEngine at ZeRO 0-3, with and without CPU offload, before its first step.
        step_scale: of this engine's model and number of ranks.
    Raises:
        UserError: the optimizer or a feature has not been proven to be exact with this, or the model is prepared for
            compact mode.
    Cost: 4 bytes for each master element and 4 more while it is stepped; four passes over the masters a step.
    """
    require_trainable(engine)
    if selected_values(engine.module) is not None:
        raise UserError("the model is prepared for compact mode: give the step scale to attach()")
    if engine.global_steps == 0:
        adapter_for(engine).prepare()
    return ScaledSteps(engine, step_scale)
