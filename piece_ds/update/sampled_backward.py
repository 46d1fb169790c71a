"""When a sampled gradient counts: in a backward that adds to the gradients of weights, as a dense one would."""

from typing import Any

import torch

from piece_ds.runtime.errors import UserError


def adds_to_weights(ctx: Any, anchor: int) -> bool:
    """Return whether the running backward adds to gradients of leaves; torch.autograd.grad() of an input does not.

    Call it inside a backward function. A tensor.backward(inputs=...) counts as one that does not, whatever is listed:
    the hidden weight is in no graph where it could be asked for.

    Args:
        ctx: of the function.
        anchor: place among its inputs of a leaf that requires a gradient and stands for the weight.
    Raises:
        UserError: the backward is to be differentiated itself (create_graph=True). Autograd does not see the weight,
            so that its part of a second derivative would be missing.
    """
    if torch.is_grad_enabled():
        raise UserError(
            "a backward with create_graph=True: sampled gradients have no second derivative; "
            "give selected_gradient='dense' (--selected_gradient dense)"
        )
    node, _ = ctx.next_functions[anchor]
    return bool(torch._C._will_engine_execute_node(node))
