"""Give every parameter of a list of experts a gradient in every backward, in the same order on every rank.

ZeRO stages 1 and 2 reduce gradients in the order in which they are finished, and those without one not at all. Ranks
that route to different experts would reduce one expert's gradient with another's, or wait forever. Stage 0 fills in
zeros in a fixed order, and stage 3 does so for a leaf module.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.models.experts import choosing_modules

_MARK = "_piece_ds_even"  # on a module that has the hook


def even_out_gradients(engine: Any) -> Callable[[], None]:
    """Let an expert that no token was routed to have gradient zero, at stages 1 and 2; return undo.

    A second call for the same model changes nothing, nor does its undo.

    Cost: a gradient of zeros for each expert that a micro-batch does not use.
    """
    if engine.zero_optimization_stage() not in (1, 2):
        return lambda: None
    modules = [m for m in dict(choosing_modules(engine.module)).values() if not hasattr(m, _MARK)]
    handles = [module.register_forward_pre_hook(_through_all, with_kwargs=True) for module in modules]
    for module in modules:
        setattr(module, _MARK, True)

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for module in modules:
            delattr(module, _MARK)

    return undo


def _through_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Pass the module's first floating input through all of its parameters, so that backward ends with them."""
    params = [param for param in module.parameters() if param.requires_grad]
    if not params or not torch.is_grad_enabled():
        return None
    for place, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:place], _ThroughAll.apply(value, *params), *args[place + 1 :]), kwargs
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, name: _ThroughAll.apply(value, *params)}
    return None


class _ThroughAll(torch.autograd.Function):
    """Return a tensor unchanged. Its backward comes after the module's, and adds zero to each parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *params: Tensor) -> Tensor:
        ctx.shapes = [(param.shape, param.dtype, param.device) for param in params]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, ...]:
        # One number, seen as a whole tensor: only an unused expert's gradient takes memory.
        zeros = (torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.shapes)
        return grad_value, *zeros
