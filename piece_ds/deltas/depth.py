"""Factors that rise with depth (LiNeS, Wang et al. 2024, arXiv 2410.17146).

Changes of block l of L are multiplied by alpha + beta (l - 1) / (L - 1): shallow blocks, which hold what all tasks use,
stay near the base, and deep ones keep what the task has learned. What lies outside of blocks gets alpha.
"""

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"(.*?)\.(\d+)\.")


def depth_factors(names: Iterable[str], first: float, last: float) -> dict[str, float]:
    """Return the factor of each parameter.

    Args:
        names: of all parameters of the model. Blocks are found by the first number in a name; towers of one model,
            whose names differ before it, are counted apart.
        first: factor of the first block, and outside of blocks: alpha.
        last: factor of the last block: alpha + beta.
    """
    names = list(names)
    found = {name: _BLOCK.match(name) for name in names}
    number = {name: (match[1], int(match[2])) for name, match in found.items() if match is not None}
    last_of: dict[str, int] = {}
    for tower, block in number.values():
        last_of[tower] = max(block, last_of.get(tower, 0))

    def depth(name: str) -> float:
        tower, block = number.get(name, ("", 0))
        return block / last_of[tower] if last_of.get(tower) else 0.0

    return {name: first + (last - first) * depth(name) for name in names}
