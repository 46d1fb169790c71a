"""A layer whose forward or backward has no deterministic form in torch on any device."""

from typing import Any

import torch
from torch import Tensor, nn


def put(x: Tensor) -> Tensor:
    """x, its elements written by Tensor.put_, which torch refuses if deterministic algorithms are asked for."""
    return torch.empty_like(x).put_(torch.arange(x.numel()), x)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return put(grad)


class Nondeterministic(nn.Module):
    """The identity. where: 'forward' or 'backward'."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        return put(x) if self.where == "forward" else _Backward.apply(x)


def install(layer: nn.Module, where: str) -> None:
    """Let a layer's output pass through the identity."""
    identity = Nondeterministic(where)
    layer.register_forward_hook(lambda module, args, output: identity(output))
