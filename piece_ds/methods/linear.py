"""Find the matrices of a model's linear layers, from which selections by matrix choose."""

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class LinearWeight:
    """The weight of one linear layer.

    Attributes:
        name: in named_parameters().
        module: the layer.
        out_first: whether its shape is [out, in] (nn.Linear) or [in, out] (transformers' Conv1D).
    """

    name: str
    module: nn.Module
    out_first: bool


def linear_weights(model: nn.Module) -> list[LinearWeight]:
    """Return the weights of the linear layers, in named_parameters() order, without the output head."""
    # By identity: tied weights appear once, under the name that named_parameters() gives.
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layer_of = {
        id(module.weight): module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    return [
        LinearWeight(name, layer_of[id(param)], isinstance(layer_of[id(param)], nn.Linear))
        for name, param in model.named_parameters()
        if id(param) in layer_of
    ]
