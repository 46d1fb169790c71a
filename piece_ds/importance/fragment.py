"""The input of every scoring function: a run of elements of one parameter on one rank."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a parameter.

    Attributes:
        parameter_index: position of the parameter in named_parameters().
        start: flat row-major index of the first element in the whole parameter.
        numel: elements in the run.
        device: where scores are wanted.
        square_sum, grad_sum: statistics of these elements, fp32, or None where the method needs none.
        weight: returns the current values of these elements, fp32 (read only when called).
        lam: lambda of the second-order normalization.
        seed: of methods that draw.
    """

    parameter_index: int
    start: int
    numel: int
    device: torch.device
    square_sum: Tensor | None
    grad_sum: Tensor | None
    weight: Callable[[], Tensor]
    lam: float = 1.0
    seed: int = 0
