"""ZeRO-3's leaf modules: parts of a model that it gathers as one, because ranks may use different parameters of them.

A list of experts is one. A gradient inside may come on one rank and not on another. But every rank's backward leaves
the module at the same place among ZeRO's gathers, and by then it is known which gradients there are. Of decoder
layers that compact mode marks (models.whole_layers) all ranks use the same parameters. But a marked part inside one is
gathered with its layer, and then backward has to leave the layer.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from piece_ds.models.whole_layers import is_whole_layer


class LeafModules:
    """The leaf modules of a model under ZeRO-3, and a call when a backward leaves one.

    Attributes:
        names: of all parameters in leaf modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._params: dict[nn.Module, dict[str, nn.Parameter]] = {}
        chosen = {param for module in model.modules() if _may_choose(module) for param in module.parameters()}
        for name, param in model.named_parameters():
            leaf = getattr(param, "ds_z3_leaf_module", None)
            if leaf is not None and (param in chosen or not is_whole_layer(leaf)):
                self._params.setdefault(leaf, {})[name] = param
        self.names = {name for params in self._params.values() for name in params}
        self._num_calls = dict.fromkeys(self._params, 0)
        self._in_forward = True

    def begin_round(self) -> None:
        """Prepare for another forward and backward."""
        self._num_calls = dict.fromkeys(self._params, 0)
        self._in_forward = True

    def end_forward(self) -> None:
        """Count no more calls: those inside backward are of checkpointing, which runs forward again."""
        self._in_forward = False

    def hooks(self, left: Callable[[Iterable[str]], None]) -> list[RemovableHandle]:
        """Install the hooks; return their handles.

        Args:
            left: called with a leaf's parameter names when backward leaves it. It is not called for a leaf that forward
                called more than once, or whose input needs no gradient: then some gradients may come later.
        """
        handles = []
        for leaf, params in self._params.items():
            handles.append(leaf.register_forward_pre_hook(self._count))
            handles.append(leaf.register_full_backward_hook(self._leaving(params, left)))
        return handles

    def _count(self, leaf: nn.Module, args: Any) -> None:
        self._num_calls[leaf] += self._in_forward

    def _leaving(
        self, params: dict[str, nn.Parameter], left: Callable[[Iterable[str]], None]
    ) -> Callable[[nn.Module, Any, Any], None]:
        def leave(leaf: nn.Module, grad_input: Any, grad_output: Any) -> None:
            # DeepSpeed's own hook, which ran before this one, has made zeros for every parameter without a gradient.
            for param in params.values():
                param.grad = None
            grads = grad_input if isinstance(grad_input, tuple) else (grad_input,)
            if self._num_calls[leaf] == 1 and any(grad is not None for grad in grads):
                left(params)

        return leave


def _may_choose(module: nn.Module) -> bool:
    """Return whether a module is marked as a leaf for itself, not as a layer that is gathered whole."""
    from deepspeed.utils import z3_leaf_module

    return bool(z3_leaf_module(module)) and not is_whole_layer(module)
