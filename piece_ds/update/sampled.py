"""The sampled gradient: a linear layer's backward forms the selected entries of its weight gradient, and no others.

The weight is frozen for autograd, so the dense gradient is never computed; an identity on the layer's output sees the
output's gradient pass and takes grad_output^T input at the selected entries (an SDDMM). It keeps the layer's input
alive, as any training of the layer must, and never the weight, which ZeRO-3 may release and partition as it likes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from piece_ds import ops
from piece_ds.state.partition import full_shape
from piece_ds.zero.weights import SelectedWeights

# Above this density the dense gradient is as fast. On a CPU, measured (4-7 times faster at 1 % in bf16, not at 10 %);
# on a GPU, from the op's memory traffic against the tensor cores' rate.
MAX_DENSITY = {"cpu": 0.02, "cuda": 0.002}

Add = Callable[[Tensor, Tensor], None]


def can_sample(module: nn.Module, name: str, selected: SelectedWeights, device_type: str) -> bool:
    """Whether the gradient of module's parameter `name` has a formula here and few enough selected elements.

    device_type is where backward runs; a weight itself may lie elsewhere.
    """
    is_linear = type(module) in (nn.Linear, Conv1D) and name.rpartition(".")[2] == "weight"
    num_elements = int(torch.Size(full_shape(selected.param)).numel())
    return is_linear and selected.index.numel() <= MAX_DENSITY[device_type] * num_elements


class SampledGradient:
    """Takes the selected entries of a linear layer's weight gradient when backward passes its output.

    Attributes:
        name: of the weight in the whole model.
        was_called: whether the layer has been called. A model that uses the weight past its layer has no gradient here.
    """

    def __init__(self, module: nn.Module, name: str, selected: SelectedWeights, out_K: Tensor) -> None:
        """
        Args:
            module: nn.Linear (weight [out, in]) or transformers' Conv1D (weight [in, out]).
            name: of its weight in the whole model.
            selected: the weight and its positions; stays without requires_grad.
            out_K: fp32, one entry per position; added to.
        Cost: of ops.sampled_gradient_; the input of the layer stays alive until backward has passed.
        """
        self.name = name
        self.was_called = False
        self._is_linear = isinstance(module, nn.Linear)
        self._index, self._out = selected.index.to(out_K.device), out_K
        # Where nothing before the layer requires a gradient, the output must all the same.
        self._anchor = torch.zeros((), device=out_K.device, requires_grad=True)
        self.remove = module.register_forward_hook(self._watch).remove

    def _watch(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.was_called = True
        if not torch.is_grad_enabled():
            return output
        return _Identity.apply(output, self._anchor, args[0].detach(), self._add)

    def _add(self, grad_output: Tensor, input: Tensor) -> None:
        grad_output, input = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grad_output, input))
        rows, columns = (grad_output, input) if self._is_linear else (input, grad_output)
        ops.sampled_gradient_(rows, columns, self._index, 1.0, self._out)


class _Identity(torch.autograd.Function):
    """A layer's output, unchanged; backward hands its gradient, with the layer's input, to a function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, input: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(input)  # not a closure: activation checkpointing has to see it
        ctx.add = add
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (input,) = ctx.saved_tensors
        ctx.add(grad_output, input)
        return grad_output, None, None, None
