"""Let ZeRO-3 gather a whole decoder layer at a time, with one set of hooks in the place of a dozen.

ZeRO-3 hooks every module and gathers its parameters when it is called. Its hooks run on the CPU, some 0.4 ms a module
and step; small steps on fast cards wait for them. A model of frozen parameters needs none below its layers. What is
gathered and multiplied is the same. Without the hooks, three or more gradients that meet at one tensor are added in
another order, one for every number of ranks.
"""

import inspect
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

_MARK = "piece_ds_whole"
_KNOWN_CODE = "transformers."
MAX_NUMEL = 10**9  # a larger layer would take too much memory at once; DeepSpeed's own limit for such a module


def gather_layers_whole(model: nn.Module) -> Callable[[], None]:
    """Mark the layers that ZeRO-3 shall gather as one; return undo. Below stage 3 it has no effect.

    An engine looks at the marks whenever it gathers: undo them only when it is gone. A layer that several engines were
    made with stays marked until all have been undone.

    Layers are what the model itself names as the parts that must stay on one device (transformers'
    `_no_split_modules`). Some stay as they are: one of code that is not transformers' own, since DeepSpeed must see the
    tensors that go in and come out (it does not look into a dataclass); one that shares a weight with another part of
    the model; one with more than MAX_NUMEL elements; one that the user has marked. Marks inside a layer do not matter:
    DeepSpeed makes some with each engine, and the next one must not round otherwise.

    Args:
        model: whose parameters will be frozen for DeepSpeed. DeepSpeed's own hooks of trained ones fail in a marked
            module whose input needs no gradient. Call it before deepspeed.initialize().
    """
    from deepspeed.utils import set_z3_leaf_module

    marked = list(_layers(model))
    handles = [_pass_by_place(layer) for layer in marked]
    for layer in marked:
        set_z3_leaf_module(layer, True)
        setattr(layer, _MARK, getattr(layer, _MARK, 0) + 1)
    return partial(_undo, marked, handles)


def is_whole_layer(module: nn.Module) -> bool:
    """Return whether gather_layers_whole() has marked a module: every rank uses all of its parameters."""
    return hasattr(module, _MARK)


def _undo(marked: list[nn.Module], handles: list[RemovableHandle]) -> None:
    from deepspeed.utils import set_z3_leaf_module

    for layer in marked:
        setattr(layer, _MARK, getattr(layer, _MARK) - 1)
        if getattr(layer, _MARK) == 0:
            delattr(layer, _MARK)
            set_z3_leaf_module(layer, False)
            for param in layer.parameters():  # DeepSpeed's note, which another engine would read
                vars(param).pop("ds_z3_leaf_module", None)
    for handle in handles:
        handle.remove()


def _layers(model: nn.Module) -> list[nn.Module]:
    from deepspeed.utils import z3_leaf_module

    names = {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}
    uses = Counter(param for _, param in model.named_parameters(remove_duplicate=False))
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        if is_whole_layer(module) or (type(module).__name__ in names and _may_be_whole(module, uses)):
            found.append(module)
        elif not z3_leaf_module(module):
            for child in module.children():
                look(child)

    look(model)
    return found


def _may_be_whole(layer: nn.Module, uses: Counter[nn.Parameter]) -> bool:
    from deepspeed.utils import z3_leaf_module

    # Known code that is entered by its forward. Some classes have other methods instead (quantizers of audio).
    kind = type(layer)
    if not kind.__module__.startswith(_KNOWN_CODE) or kind.forward is nn.Module.forward or z3_leaf_module(layer):
        return False

    # DeepSpeed keeps one leaf for each parameter, and would release a shared one for another that still needs it.
    if any(uses[param] > 1 for param in layer.parameters()):
        return False
    numel = sum(prod(getattr(param, "ds_shape", param.shape)) for param in layer.parameters())
    return 0 < numel <= MAX_NUMEL


def _pass_by_place(layer: nn.Module) -> RemovableHandle:
    """Pass a layer's first argument by place, also if the model names it: ZeRO-3 looks at no other.

    It releases the layer when backward has passed the tensors that were passed by place.
    """
    parameters = inspect.signature(layer.forward).parameters.values()
    first = next((p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD), "")
    return layer.register_forward_pre_hook(partial(_move, first), prepend=True, with_kwargs=True)


def _move(
    first: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if args or first not in kwargs:
        return None
    rest = dict(kwargs)
    return (rest.pop(first),), rest
