"""Which way the gradient of each selected parameter is taken, chosen once by a rule that depends on nothing measured.

Timing the two ways in the run would choose the faster one and, as their roundings differ, other weights on another day.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from piece_ds import ops
from piece_ds.config.arguments import SELECTED_GRADIENTS, require_choice
from piece_ds.models.layout import full_shape
from piece_ds.runtime.distributed import is_main
from piece_ds.zero.weights import SelectedWeights


def collect_dense(selected: SelectedWeights, out_K: Tensor) -> Callable[[], None]:
    """Let autograd form the whole gradient, take the selected elements, and free it. Works for any module.

    Args:
        selected: the parameter and its positions; gets requires_grad.
        out_K: fp32, one entry per position; added to.
    Cost: one gradient of this parameter is alive at a time, from its last use in backward to this hook.
    """

    index = selected.index.to(out_K.device)

    def take(param: nn.Parameter) -> None:
        grad, param.grad = param.grad, None
        if grad is not None:
            ops.gather_add_(grad.detach().reshape(-1), index, 1.0, out_K)

    selected.param.requires_grad_(True)
    handle = selected.param.register_post_accumulate_grad_hook(take)

    def remove() -> None:
        handle.remove()
        selected.param.requires_grad_(False)

    return remove


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


logger = logging.getLogger(__name__)


class GradientCollection:
    """Adds, in every backward, the gradients of selected elements to their parts of a flat fp32 tensor."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, SelectedWeights],
        parts: Iterable[tuple[str, Tensor]],
        gradient: str,
    ) -> None:
        """
        Args:
            model: whose parameters they are, by name.
            weights: parameter name -> its selected elements.
            parts: (parameter name, fp32 tensor of one entry per selected element).
            gradient: 'dense' (let autograd form the whole gradient of one parameter at a time), or 'auto': sampled
                for linear layers with few selected elements, dense for everything else.
        """
        require_choice("selected_gradient", gradient, SELECTED_GRADIENTS)
        self._sampled: list[SampledGradient] = []
        self._remove: list[Callable[[], None]] = []
        dense = []
        for name, part in parts:
            module = model.get_submodule(name.rpartition(".")[0])
            if gradient == "auto" and can_sample(module, name, weights[name], part.device.type):
                self._sampled.append(SampledGradient(module, name, weights[name], part))
                self._remove.append(self._sampled[-1].remove)
            else:
                dense.append(name)
                self._remove.append(collect_dense(weights[name], part))
        if is_main():
            logger.info(
                "gradients of selected weights: %d tensors sampled, %d dense%s",
                len(self._sampled),
                len(dense),
                f" ({_shortened(dense)})" if dense else "",
            )

    def check(self) -> None:
        """Once backward has run: warn of weights that the model uses past the layer that holds them."""
        unseen = [sampled.name for sampled in self._sampled if not sampled.was_called]
        if unseen:
            logger.warning(
                "no gradient for %s: the layer was not called. If the model uses its weight in another way, "
                "train with --selected_gradient dense",
                _shortened(unseen),
            )

    def close(self) -> None:
        """End it."""
        for remove in self._remove:
            remove()


def _shortened(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
