"""Where a mask lies: selected elements per layer and module type, and how much two masks share.

`piece_ds masks MASK [MASK ...]` prints both for mask files.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import MASK, open_artifact
from piece_ds.checkpoint.mask_file import check_mask_file, parameters_in, whole_index

OUTSIDE = "other"


@dataclass(frozen=True)
class Place:
    """Where a parameter lies.

    Attributes:
        layer: its number as text, such as '3', or 'other'.
        module: a module type such as 'self_attn.q_proj'.
    """

    layer: str
    module: str


def place_of(name: str) -> Place:
    """Return the place of a parameter, from its name. The module of a bias keeps the suffix '.bias'.

    For example, model.layers.3.self_attn.q_proj.weight is in layer '3' and module 'self_attn.q_proj'.
    """
    # The first number in a name is the layer; experts have a second one.
    match = re.match(r".*?\.(\d+)\.(.+)$", name)
    layer, rest = (match.group(1), match.group(2)) if match else (OUTSIDE, name)
    return Place(layer, rest.removesuffix(".weight"))


def mask_statistics(index: dict[str, Tensor], numel: dict[str, int]) -> dict[str, dict[str, dict[str, int]]]:
    """Count selected and all elements per layer and module type.

    Args:
        index: parameter name -> selected positions (Mask.whole()).
        numel: parameter name -> elements, for the parameters to count.
    Returns:
        layer -> module type -> {"selected": ..., "total": ...}.
    """
    table: dict[str, dict[str, dict[str, int]]] = {}
    for name, total in numel.items():
        place = place_of(name)
        cell = table.setdefault(place.layer, {}).setdefault(place.module, {"selected": 0, "total": 0})
        cell["selected"] += index[name].numel() if name in index else 0
        cell["total"] += total
    return table


def overlap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Return the Jaccard index of two masks: shared / united selected elements, in [0, 1]."""
    # Positions of a mask are distinct, which isin() may assume.
    shared = sum(int(torch.isin(first[n], second[n], assume_unique=True).sum()) for n in first.keys() & second.keys())
    united = sum(i.numel() for i in first.values()) + sum(i.numel() for i in second.values()) - shared
    return shared / united if united else 0.0


def read_index(path: Path | str) -> tuple[dict[str, Tensor], dict[str, int], dict[str, str]]:
    """Return the content of a mask file.

    Returns:
        Selected positions by parameter, elements of each parameter whose shape the file gives, and the metadata.
    Raises:
        UserError: see check_mask_file().
    """
    metadata = check_mask_file(path)
    with open_artifact(path, MASK, verify=False) as file:
        names = parameters_in(file)
        index = {name: whole_index(file, name) for name in names}
        sizes = {name: file.metadata.numel(name) for name in names}
    return index, {name: size for name, size in sizes.items() if size is not None}, metadata
