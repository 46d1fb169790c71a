"""How many elements may be selected, and which parameters share one budget."""

import logging
import re

from piece_ds.state.partition import Layout

logger = logging.getLogger(__name__)


def num_to_select(ratio: float, numel: int) -> int:
    """k = max(1, int(ratio * numel)): the paper's rule."""
    return max(1, int(numel * ratio))


def budget_groups(layout: Layout, ratio: float, budget: str) -> list[tuple[list[str], int]]:
    """(names of the eligible parameters that compete, number of elements to select among them) per group.

    budget 'model': one group; k counts every parameter of the model, embeddings included, as the paper's code does.
    budget 'layer': one group per transformer block, and one for everything outside the blocks.
    budget 'tensor': one group per parameter. For both, k counts the eligible elements of the group.
    k is at most the number of eligible elements; where that cuts it, a line is logged.
    """
    eligible = layout.eligible()
    if not eligible:
        raise ValueError("the model has no eligible parameter: every one is frozen or the input embedding")
    if budget == "model":
        k = num_to_select(ratio, layout.total)
        if k > layout.num_eligible:
            logger.warning("ratio %g asks for %d elements, only %d are eligible: all of them are selected",
                           ratio, k, layout.num_eligible)  # fmt: skip
        return [([info.name for info in eligible], min(k, layout.num_eligible))]
    groups: dict[str, list[str]] = {}
    numel: dict[str, int] = {}
    for info in eligible:
        key = info.name if budget == "tensor" else layer_of(info.name)
        groups.setdefault(key, []).append(info.name)
        numel[key] = numel.get(key, 0) + info.numel
    return [(names, num_to_select(ratio, numel[key])) for key, names in groups.items()]


def layer_of(name: str) -> str:
    """'model.layers.3' for a parameter of block 3; 'other' outside the blocks."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else "other"
