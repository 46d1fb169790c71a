"""Select whole parameters: only the norms (LayerNorm tuning), or half of the tensors (HFT)."""

import random
import re
from collections.abc import Callable

import torch
from torch import nn

from piece_ds.methods.request import SelectionRequest
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import layer_of
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout

# Names of attention's parameters match this. A block's other matrices are feed-forward.
_ATTENTION = re.compile(r"attn|attention")


def norm_names(model: nn.Module, layout: Layout, seed: int, task: str) -> set[str]:
    """Return the eligible parameters of normalization layers: modules whose class has "norm" in its name.

    seed and task are not used.

    Source: LayerNorm tuning (Zhao et al., arXiv 2312.11420); a baseline of arXiv 2511.15375.
    """
    inside = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return {info.name for info in layout.eligible() if info.name in inside}


def half_names(model: nn.Module, layout: Layout, seed: int, task: str) -> set[str]:
    """Return half of each block's parameters by category, drawn for each task, and all eligible ones outside blocks.

    In a block, half of the attention's, half of the feed-forward's and half of the remaining parameters (norms) are
    trained; the other half is frozen. If a category has an odd number, the draws of successive blocks are rounded up
    and down in turn. A bias goes with its weight.

    Source: HFT (Hui et al., arXiv 2404.18466), category-level selection. The paper trains the input embeddings; here
    they are frozen, as in every method.
    """
    draw = random.Random(f"{seed}/{task}")
    eligible = [info.name for info in layout.eligible()]
    names = {name for name in eligible if layer_of(name) == "other"}

    # Group the modules of each block by category.
    groups: dict[tuple[str, str], list[str]] = {}
    for name in eligible:
        if name not in names:
            unit = name.rpartition(".")[0]
            members = groups.setdefault((layer_of(name), _category(model, name)), [])
            if unit not in members:
                members.append(unit)

    # Draw half of each group.
    round_up: dict[str, bool] = {}
    units: set[str] = set()
    for (_, category), members in groups.items():
        up = round_up[category] = not round_up.get(category, False) if len(members) % 2 else False
        units.update(draw.sample(members, (len(members) + up) // 2))
    return names | {name for name in eligible if name.rpartition(".")[0] in units}


def _category(model: nn.Module, name: str) -> str:
    # A norm is known by its class, attention by the parameter's name.
    module = model.get_submodule(name.rpartition(".")[0])
    if "norm" in type(module).__name__.lower():
        return "norm"
    return "attention" if _ATTENTION.search(name) else "feed-forward"


Names = Callable[[nn.Module, Layout, int, str], set[str]]


def count_whole(names_of: Names, model: nn.Module, layout: Layout, seed: int, task: str) -> int:
    """Return how many elements the chosen parameters have."""
    names = names_of(model, layout, seed, task)
    return sum(info.selectable.numel for info in layout.parameters if info.name in names)


def select_whole(names_of: Names, request: SelectionRequest) -> Mask:
    """Return the mask of every element of the chosen parameters.

    Args:
        names_of: which parameters.
        request: the selection.
    Raises:
        UserError: there is none.
    Cost: 8 bytes per selected element of this rank, and of the whole model when training begins. Half of a model with
    billions of weights is better trained by freezing the other half.
    """
    layout = request.layout
    names = names_of(request.model, layout, request.config.seed, request.options.task)
    if not names:
        raise UserError(
            f"--method {request.method}: the model has no parameter to select; "
            "its normalization layers have no eligible weight"
        )

    # Each rank lists its own range of the chosen parameters.
    index = {
        info.name: torch.arange(part.start, part.stop)
        for info, part, _ in layout.owned()
        if info.name in names and part.numel
    }
    return request.mask(index, count_whole(names_of, request.model, layout, request.config.seed, request.options.task))
