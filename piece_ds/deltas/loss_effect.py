"""How much each change of a delta lowers the loss on some rows, from one gradient in the middle of the way.

Between base and task the loss moves by the integral of gradient times change. Its value at the middle, multiplied by
the change, gives that integral up to third order, one number an element: the sum of the numbers is the whole move.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from piece_ds.deltas.delta import Delta
from piece_ds.deltas.live import LiveDelta
from piece_ds.evaluation.loss import count_labels


def loss_effects(model: nn.Module, delta: Delta, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return, for each parameter, by how many nats a token each change lowers the loss; fp64.

    Args:
        model: the base that the delta goes on, whole; in fp32, since a 16-bit middle may be one of the two ends. It
            holds the base's values again afterwards, and its gradients are gone.
        delta: with previous values.
        batches: input_ids, labels and what else the model takes, on its device.
    Cost: a forward and a backward pass over the batches; the gradient of every parameter that changes.
    """
    params = dict(model.named_parameters())
    for name, param in params.items():
        param.requires_grad_(name in delta.shapes)
        param.grad = None
    live = LiveDelta.of(model, delta)
    live.set_(0.5)
    model.eval()  # dropout would measure another loss

    # The loss is a mean over a batch's tokens, so batches of different lengths weigh as they should.
    num_tokens = 0
    for batch in batches:
        count = count_labels(batch["labels"])
        if count:
            (model(**batch, use_cache=False).loss * count).backward()
            num_tokens += count

    # The mean gradient at the chosen elements, times what they move by.
    effects = {}
    for name, change, held in live.held:
        grad = params[name].grad
        assert change.previous is not None
        at = torch.zeros(change.index.numel()) if grad is None else grad.reshape(-1)[held.index.to(grad.device)].cpu()
        moved = change.values.double() - change.previous.double()
        effects[name] = -moved * at.double() / max(1, num_tokens)
        params[name].grad = None
    live.set_(0.0)
    return effects
