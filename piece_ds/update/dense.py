"""The dense way to the gradient of a parameter's selected elements: form all of it, take them, free it."""

from collections.abc import Callable

from torch import Tensor, nn

from piece_ds import ops
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
