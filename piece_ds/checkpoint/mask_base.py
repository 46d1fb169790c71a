"""Of which weights a mask was selected: noted with it, and said if it is used on others."""

import logging
from dataclasses import replace
from pathlib import Path

from torch import nn

from piece_ds.runtime.distributed import is_main
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.weights_hash import hexadecimal
from piece_ds.zero.weights import weights_fingerprint

logger = logging.getLogger(__name__)


def fingerprint_of(model: nn.Module, layout: Layout) -> str:
    """Return the fingerprint of all weights, as deltas name their base. A collective.

    Cost: reads this rank's part of the weights once.
    """
    return hexadecimal(int(weights_fingerprint(model, Mask(layout, {}, 0))))


def with_base(mask: Mask, model: nn.Module) -> Mask:
    """Return a mask that names the weights it was just selected on. A collective; cost: see fingerprint_of()."""
    return replace(mask, base_fingerprint=fingerprint_of(model, mask.layout))


def say_other_base(mask: Mask, model: nn.Module, path: Path | str) -> None:
    """Log in one line that a mask from path was selected on other weights than the model's. A collective.

    It is no error: a mask may be meant for the next checkpoint, and files of other programs do not say. But a mask of
    another checkpoint of the same architecture fits by its shapes, and trains weights that matter elsewhere.
    """
    if mask.base_fingerprint is None:
        return
    own = fingerprint_of(model, mask.layout)
    if mask.base_fingerprint != own and is_main():
        logger.warning(
            "mask %s was selected on other weights (fingerprint %s, this model's %s): it is of another checkpoint, or "
            "of the same one in another dtype",
            path,
            mask.base_fingerprint,
            own,
        )
