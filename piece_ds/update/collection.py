"""Which way the gradient of each selected parameter is taken, chosen once by a rule that depends on nothing measured.

Timing the two ways in the run would choose the faster one and, as their roundings differ, other weights on another day.
"""

import logging
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from piece_ds.config import SELECTED_GRADIENTS, require_choice
from piece_ds.distributed import is_main
from piece_ds.update.dense import collect_dense
from piece_ds.update.sampled import SampledGradient, can_sample
from piece_ds.zero.weights import SelectedWeights

logger = logging.getLogger(__name__)


class GradientCollection:
    """Adds, in every backward, the gradients of selected elements to their parts of a flat fp32 tensor."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, SelectedWeights],
        parts: Iterable[tuple[str, Tensor]],
        gradient: str,
    ) -> None:
        """
        Args:
            model: whose parameters they are, by name.
            weights: parameter name -> its selected elements.
            parts: (parameter name, fp32 tensor of one entry per selected element).
            gradient: 'dense' (let autograd form the whole gradient of one parameter at a time), or 'auto': sampled
                for linear layers with few selected elements, dense for everything else.
        """
        require_choice("selected_gradient", gradient, SELECTED_GRADIENTS)
        self._sampled: list[SampledGradient] = []
        self._remove: list[Callable[[], None]] = []
        dense = []
        for name, part in parts:
            module = model.get_submodule(name.rpartition(".")[0])
            if gradient == "auto" and can_sample(module, name, weights[name], part.device.type):
                self._sampled.append(SampledGradient(module, name, weights[name], part))
                self._remove.append(self._sampled[-1].remove)
            else:
                dense.append(name)
                self._remove.append(collect_dense(weights[name], part))
        if is_main():
            logger.info("gradients of selected weights: %d tensors sampled, %d dense%s",
                        len(self._sampled), len(dense), f" ({_shortened(dense)})" if dense else "")  # fmt: skip

    def check(self) -> None:
        """Once backward has run: warn of weights that the model uses past the layer that holds them."""
        unseen = [sampled.name for sampled in self._sampled if not sampled.was_called]
        if unseen:
            logger.warning("no gradient for %s: the layer was not called. If the model uses its weight in another way, "
                           "train with --selected_gradient dense", _shortened(unseen))  # fmt: skip

    def close(self) -> None:
        """End it."""
        for remove in self._remove:
            remove()


def _shortened(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
