"""Choose how the gradient of each selected parameter is taken, by a rule that measures nothing in the run.

Timing the two ways in the run would choose the faster one. Their roundings differ, so another day would give other
weights.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from piece_ds import ops
from piece_ds.config.piece import SELECTED_GRADIENTS
from piece_ds.config.ranges import require_choice
from piece_ds.models.experts import stacked_experts
from piece_ds.models.layout import full_shape
from piece_ds.ops.sampling_rule import max_density
from piece_ds.runtime.distributed import is_main
from piece_ds.state.partition import is_partitioned
from piece_ds.update.expert_gradients import SampledExperts
from piece_ds.update.sampled_backward import adds_to_weights
from piece_ds.zero.weights import SelectedWeights


def collect_dense(
    selected: SelectedWeights, out_K: Tensor, on_gradient: Callable[[], None] | None = None
) -> Callable[[], None]:
    """Let autograd form the whole gradient, take the selected elements, and free it; return remove. For any module.

    Args:
        selected: the parameter and its positions; gets requires_grad.
        out_K: fp32, one entry per position; added to.
        on_gradient: called whenever a gradient has been formed.
    Cost: one gradient of this parameter is alive at a time, from its last use in backward to this hook.
    """

    index = selected.index.to(out_K.device)

    # Runs as soon as the gradient is complete, and frees it.
    def take(param: nn.Parameter) -> None:
        grad, param.grad = param.grad, None
        if grad is not None:
            ops.gather_add_(grad.detach().reshape(-1), index, 1.0, out_K)
            if on_gradient is not None:
                on_gradient()

    selected.param.requires_grad_(True)
    handle = selected.param.register_post_accumulate_grad_hook(take)

    def remove() -> None:
        handle.remove()
        selected.param.requires_grad_(False)

    return remove


Add = Callable[[Tensor, Tensor], None]


def can_sample(module: nn.Module, name: str, selected: SelectedWeights, device: torch.device) -> bool:
    """Return whether the gradient of module's parameter `name` can be sampled, and is sparse enough to be worth it.

    Args:
        module: that holds the parameter. Only linear layers have a formula here.
        name: of the parameter, in module or in the whole model.
        selected: the parameter and its positions.
        device: where backward runs; the weight itself may lie elsewhere.
    """
    is_linear = type(module) in (nn.Linear, Conv1D) and name.rpartition(".")[2] == "weight"
    is_linear = is_linear and "forward" not in vars(module)  # a replaced forward may compute anything
    return is_linear and is_sparse(selected, device)


def is_sparse(selected: SelectedWeights, device: torch.device) -> bool:
    """Return whether so few elements of a parameter are selected that sampling its gradient is worth it.

    For stacked experts too: each is multiplied by itself, as a linear layer with fewer tokens.
    """
    shape = torch.Size(full_shape(selected.param))
    density = selected.index.numel() / shape.numel()
    return density <= max_density(device, selected.param.dtype, shape[-2:].numel())


class SampledGradient:
    """Take the selected entries of a linear layer's weight gradient when backward passes its output.

    While the layer runs, autograd does not see its weight, so no dense gradient is formed. Outside the layer it does. A
    second use of the weight (a layer that shares it, a product in another module's forward, a penalty in the loss) has
    a dense gradient of its own, whose selected entries are added.

    Attributes:
        name: of the weight in the whole model.
        was_called: whether the layer has been called with gradients.
        used_elsewhere: whether a gradient has come from a use of the weight outside its layer.
    """

    def __init__(self, module: nn.Module, name: str, selected: SelectedWeights, out_K: Tensor) -> None:
        """Install the hooks.

        Args:
            module: nn.Linear (weight [out, in]) or transformers' Conv1D (weight [in, out]).
            name: of its weight in the whole model.
            selected: the weight and its positions; gets requires_grad.
            out_K: fp32, one entry per position; added to.
        Cost: of ops.sampled_gradient_; the input of the layer stays alive until backward has passed. A weight that is
        used elsewhere costs what collect_dense() costs as well.
        """
        self.name = name
        self.was_called = self.used_elsewhere = False
        self._is_linear = isinstance(module, nn.Linear)
        self._weight, self._index, self._out = selected.param, selected.index.to(out_K.device), out_K
        # The output must require a gradient even if nothing before the layer does.
        self._anchor = torch.zeros((), device=out_K.device, requires_grad=True)
        # The weight is hidden by the first hook before forward: ZeRO-3 keeps a weight through a recomputation of
        # non-reentrant checkpointing only if it is frozen when it is gathered, and a frozen one is saved as it is. It
        # is shown by the first hook after forward, also on errors: that recomputation ends by an error as soon as it
        # has what it needs.
        # With two forward passes before a backward, ZeRO-3 may all the same release it before the recomputation is
        # read: then what is saved must be a tensor of its own, which a release does not empty.
        handles = [
            module.register_forward_pre_hook(self._hide, prepend=True),
            *([module.register_forward_pre_hook(self._keep)] if is_partitioned(selected.param) else []),
            # Before all other hooks, which may return another output: the formula is that of the layer's own.
            module.register_forward_hook(self._watch, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._show, prepend=True, always_call=True),
        ]
        stop = collect_dense(selected, out_K, self._note_use)
        self._remove = [stop, *(handle.remove for handle in handles)]

    def remove(self) -> None:
        """Restore the layer and its weight."""
        for remove in self._remove:
            remove()

    def _hide(self, *_: Any) -> None:
        self._weight.requires_grad_(False)

    def _keep(self, module: nn.Module, *_: Any) -> None:
        """Let the layer see a view of its gathered weight while backward recomputes it."""
        if torch._C._current_graph_task_id() != -1:
            vars(module)["weight"] = self._weight.detach()

    def _show(self, module: nn.Module, *_: Any) -> None:
        vars(module).pop("weight", None)
        self._weight.requires_grad_(True)

    def _note_use(self) -> None:
        self.used_elsewhere = True

    def _watch(self, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        self.was_called = True
        (input,) = (*args, *kwargs.values())
        return _Identity.apply(output, self._anchor, input.detach(), self._add)

    def _add(self, grad_output: Tensor, input: Tensor) -> None:
        grad_output, input = (t.reshape(-1, t.shape[-1]).contiguous() for t in (grad_output, input))

        # The gradient of weight[i, j] is the sum over tokens of rows[i] * columns[j].
        rows, columns = (grad_output, input) if self._is_linear else (input, grad_output)
        ops.sampled_gradient_(rows, columns, self._index, 1.0, self._out)


class _Identity(torch.autograd.Function):
    """Return a layer's output unchanged; backward hands its gradient and the layer's input to a function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, input: Tensor, add: Add) -> Tensor:
        ctx.save_for_backward(input)  # not a closure: activation checkpointing has to see it
        ctx.add = add
        # The same memory, but no view to autograd, which would refuse `+=` or an in-place activation after the layer.
        # No layer here saves its output for its own backward, so writing there is harmless.
        return output.data

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (input,) = ctx.saved_tensors
        if adds_to_weights(ctx, anchor=1):
            ctx.add(grad_output, input)
        return grad_output, None, None, None


logger = logging.getLogger(__name__)


class GradientCollection:
    """Add, in every backward, the gradients of selected elements to their parts of a flat fp32 tensor."""

    def __init__(
        self,
        model: nn.Module,
        weights: dict[str, SelectedWeights],
        parts: Iterable[tuple[str, Tensor]],
        gradient: str,
    ) -> None:
        """Choose the way for each parameter, install its hooks, and log how many go which way.

        Args:
            model: whose parameters they are, by name.
            weights: parameter name -> its selected elements.
            parts: (parameter name, fp32 tensor of one entry per selected element).
            gradient: 'dense' (let autograd form the whole gradient of one parameter at a time), or 'auto': sampled for
                linear layers and stacked experts with few selected elements, dense for everything else.
        Raises:
            UserError: gradient is neither.
        """
        require_choice("selected_gradient", gradient, SELECTED_GRADIENTS)

        # One hook or set of hooks a parameter.
        self._sampled: list[SampledGradient | SampledExperts] = []
        self._remove: list[Callable[[], None]] = []
        dense, stacked = [], stacked_experts(model)
        for name, part in parts:
            owner = name.rpartition(".")[0]
            module, selected = model.get_submodule(owner), weights[name]
            is_stacked = owner in stacked and len(full_shape(selected.param)) == 3 and "forward" not in vars(module)
            if gradient == "auto" and can_sample(module, name, selected, part.device):
                self._sampled.append(SampledGradient(module, name, selected, part))
                self._remove.append(self._sampled[-1].remove)
            elif gradient == "auto" and is_stacked and is_sparse(selected, part.device):
                self._sampled.append(SampledExperts(module, name, selected, part, collect_dense))
                self._remove.append(self._sampled[-1].remove)
            else:
                dense.append(name)
                self._remove.append(collect_dense(selected, part))
        if is_main():
            logger.info(
                "gradients of selected weights: %d tensors sampled, %d dense%s",
                len(self._sampled),
                len(dense),
                f" ({_shortened(dense)})" if dense else "",
            )

    def check(self) -> None:
        """Warn of weights that are used in other ways than sampled, and of those not used at all.

        Call it after a backward.
        """
        elsewhere = [sampled.name for sampled in self._sampled if sampled.used_elsewhere]
        if elsewhere and is_main():
            logger.warning(
                "%d weights are used outside the products that are sampled as well: %s. The gradients of these uses "
                "are formed whole, one at a time, and count",
                len(elsewhere),
                _shortened(elsewhere),
            )

        # Per rank: another rank's data may use them.
        unused = [s.name for s in self._sampled if not (s.was_called or s.used_elsewhere)]
        if unused:
            logger.warning("no gradient for %s: the loss of the first step does not use it", _shortened(unused))

    def close(self) -> None:
        """Remove all hooks."""
        for remove in self._remove:
            remove()


def _shortened(names: list[str], most: int = 4) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
