"""Find a model's experts and routers, by the words that all mixture-of-experts models of transformers use.

A block holds its experts under the name `experts`, or in a class whose name has "Experts" in it. transformers 5 stacks
the experts of a layer into parameters of three dimensions, [experts, out, in] or [experts, in, out]. Other code keeps a
list of modules, of which a micro-batch runs only those that it routes a token to.
"""

from collections.abc import Iterator
from math import prod

from torch import nn

_LISTS = (nn.ModuleList, nn.ModuleDict)
# Names of a router beside the experts: Mixtral, Qwen and DeepSeek say `gate`, gpt-oss, Llama 4 and Granite `router`.
_ROUTER_NAMES = ("gate", "router")


def expert_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of every module that holds experts, in the model's order."""
    for name, module in model.named_modules():
        if any(_are_experts(child, part) for child, part in module.named_children()):
            yield name, module


def stacked_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return name -> module for every module with experts stacked into a parameter of three dimensions."""
    return {
        name: module
        for name, module in model.named_modules()
        if _are_experts(name.rpartition(".")[2], module)
        and any(len(getattr(param, "ds_shape", param.shape)) == 3 for param in module.parameters(recurse=False))
    }


def experts_of(block: nn.Module) -> tuple[int, int]:
    """Return how many experts a module that holds experts has, and the elements of all of them; (0, 0) for none."""
    number = numel = 0
    for child, part in block.named_children():
        if not _are_experts(child, part):
            continue
        shapes = [tuple(getattr(param, "ds_shape", param.shape)) for param in part.parameters()]
        lists = [len(inner) for inner in part.modules() if isinstance(inner, _LISTS)]
        # Stacked experts come first in their parameters, biases too.
        number = max([number, *lists[:1], *(shape[0] for shape in shapes if len(shape) == 3)])
        numel += sum(prod(shape) for shape in shapes)
    return number, numel if number else 0


def router_names(model: nn.Module) -> set[str]:
    """Return names, as in named_parameters(), of everything that decides which experts see a token, and how much.

    That is, beside the experts of a block: a child named `gate` or `router`, or of a class with "Router" in its name,
    and the gate of a shared expert (`shared_expert_gate`).
    """
    found = set()
    for block, module in expert_blocks(model):
        for child, part in module.named_children():
            if _is_router(child, part):
                names = (name for name, _ in part.named_parameters())
                found |= {".".join(filter(None, (block, child, name))) for name in names}
    # A parameter has the name of its first use.
    return found & {name for name, _ in model.named_parameters()}


def gather_experts_whole(model: nn.Module) -> list[str]:
    """Make ZeRO-3 gather lists of experts as one; return the names of the modules that were marked.

    ZeRO-3 gathers a module's parameters when the module is called, and all ranks must call the same ones. Ranks route
    their tokens to different experts of a list, so without this mark they wait for each other forever. Stacked experts
    need no mark: their one module is called by every micro-batch. Call it before deepspeed.initialize(). Below stage 3
    it has no effect.
    """
    from deepspeed.utils import set_z3_leaf_module

    found = dict(choosing_modules(model))
    for module in found.values():
        set_z3_leaf_module(module, True)
    return list(found)


def unmarked_lists(model: nn.Module) -> str | None:
    """Return the name of a module that chooses among a list of experts, which ZeRO-3 gathers one by one; or None.

    Args:
        model: of an engine at stage 3.
    """
    from deepspeed.utils import z3_leaf_parameter

    for name, module in choosing_modules(model):
        if not all(z3_leaf_parameter(param) for param in module.parameters()):
            return name
    return None


def choosing_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of the modules whose forward chooses among a list of experts."""
    for name, module in expert_blocks(model):
        for child, part in module.named_children():
            if not _are_experts(child, part) or not any(_is_list(inner) for inner in part.modules()):
                continue
            # A plain list has no forward: the block that holds it chooses.
            if type(part).forward in (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward):
                yield name, module
            else:
                yield ".".join(filter(None, (name, child))), part


def _are_experts(name: str, module: nn.Module) -> bool:
    return name == "experts" or "Experts" in type(module).__name__


def _is_router(name: str, module: nn.Module) -> bool:
    is_gate_of_expert = "expert" in name and name.endswith("gate")
    return name in _ROUTER_NAMES or is_gate_of_expert or "Router" in type(module).__name__


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, _LISTS) and len(module) > 1
