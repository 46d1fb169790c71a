"""How the gradient of a parameter's selected elements is taken out of backward: one strategy a function.

A strategy is called once per parameter with a selected element. From then on every backward adds the local gradient of
those elements, in fp32 and in their order, to a slice of the step's gradient; what it returns ends that.
"""

from collections.abc import Callable

from torch import Tensor, nn

from piece_ds.zero.weights import SelectedWeights

Collect = Callable[[nn.Module, str, SelectedWeights, Tensor], Callable[[], None]]


def collect_dense(module: nn.Module, name: str, selected: SelectedWeights, out_K: Tensor) -> Callable[[], None]:
    """Let autograd form the whole gradient, take the selected elements, and free it. Works for any module.

    Args:
        module: that holds the parameter; not used here, but by a strategy that knows the module's formula.
        name: of the parameter in the whole model.
        selected: the parameter and its positions; gets requires_grad.
        out_K: fp32, one entry per position; added to.
    Cost: one gradient of this parameter is alive at a time, from its last use in backward to this hook.
    """

    def take(param: nn.Parameter) -> None:
        grad, param.grad = param.grad, None
        if grad is not None:
            out_K.add_(selected.read(grad.detach()))

    selected.param.requires_grad_(True)
    handle = selected.param.register_post_accumulate_grad_hook(take)

    def remove() -> None:
        handle.remove()
        selected.param.requires_grad_(False)

    return remove
