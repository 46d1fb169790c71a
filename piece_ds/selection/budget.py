"""Decide how many elements may be selected, and which parameters share one budget."""

import logging
import re

from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout

logger = logging.getLogger(__name__)


def num_to_select(ratio: float, numel: int) -> int:
    """Return k = max(1, int(ratio * numel)), the paper's rule."""
    return max(1, int(numel * ratio))


def num_selected(layout: Layout, ratio: float) -> int:
    """Return how many elements select() will select: k, or every eligible element if there are fewer."""
    return min(num_to_select(ratio, layout.total), layout.num_eligible)


def require_eligible(layout: Layout) -> None:
    """Raise UserError if no parameter may be selected."""
    if not layout.eligible():
        raise UserError(
            f"the model has no eligible parameter: each of its {len(layout.parameters)} is frozen, excluded, or left "
            "out by the rule (the input embedding, encoders of images, routers): let some require gradients "
            "(requires_grad_(True)), or exclude fewer"
        )


def budget_groups(layout: Layout, ratio: float, budget: str) -> list[tuple[list[str], int]]:
    """Return (names of the eligible parameters that compete, number of elements to select among them) per group.

    Args:
        layout: of the model.
        ratio: selected / all elements of the model. k counts every parameter, embeddings included, as the paper's code
            does. It is at most the number of eligible elements; if that lowers it, a line is logged.
        budget: 'model': one group. 'layer': one group per transformer block, and one for everything outside the blocks.
            'tensor': one group per parameter. For the last two, the same k is shared out in proportion to eligible
            elements, and a group without a share is left out.
    Raises:
        UserError: nothing is eligible.
    """
    # How many in all.
    require_eligible(layout)
    eligible = layout.eligible()
    k = num_selected(layout, ratio)
    if k < num_to_select(ratio, layout.total):
        logger.warning(
            "ratio %g asks for %d elements, only %d are eligible: all are selected",
            ratio,
            num_to_select(ratio, layout.total),
            k,
        )

    # Who competes with whom, and for how many of them.
    groups: dict[str, list[str]] = {}
    numel: dict[str, int] = {}
    for info in eligible:
        key = {"model": "", "layer": layer_of(info.name), "tensor": info.name}[budget]
        groups.setdefault(key, []).append(info.name)
        numel[key] = numel.get(key, 0) + info.selectable.numel
    shares = share_out(k, list(numel.values()))
    return [(names, share) for names, share in zip(groups.values(), shares, strict=True) if share]


def share_out(k: int, weights: list[int]) -> list[int]:
    """Return k shared out in whole parts, in proportion to weights, by largest remainder.

    Equal remainders: earlier first.
    """
    total = sum(weights)
    shares = [k * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(k * weights[i] % total), i))
    for i in by_remainder[: k - sum(shares)]:
        shares[i] += 1
    return shares


def layer_of(name: str) -> str:
    """Return 'model.layers.3' for a parameter of block 3, 'other' for one outside the blocks."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else "other"
