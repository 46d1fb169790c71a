"""Decoders that save memory on long rows as DeepSpeed's ALST does: tiles, and activations that wait on the host."""

from types import MethodType
from typing import Any

import torch
from deepspeed import checkpointing
from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss, TiledMLP
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from support.models import make_model

NUM_TILES = 3  # divides no length of the rows


def tiled_mlp() -> nn.Module:
    """Feed-forward blocks that are computed tile by tile, again in backward."""
    model = make_model("llama")

    def whole(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    def tiled(self: Any, x: Tensor) -> Tensor:
        weights = [self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight]
        return TiledMLP.apply(whole, self, x, NUM_TILES, weights)

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(tiled, layer.mlp)
    return model


class TiledLoss(nn.Module):
    """A decoder whose logits are never there as a whole: DeepSpeed runs the head's backward inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = make_model("llama")
        self.config = self.decoder.config

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def forward(self, labels: Tensor, **inputs: Tensor) -> CausalLMOutput:
        hidden = self.decoder.model(**inputs).last_hidden_state
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        count = (targets != -100).sum()

        def summed(self: Any, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.lm_head(x), y, reduction="sum") / count

        weights = [self.decoder.lm_head.weight]
        return CausalLMOutput(
            loss=TiledFusedLogitsLoss.apply(summed, self.decoder, hidden, targets, None, NUM_TILES, weights, "sum")
        )


def on_the_host() -> nn.Module:
    """Activations that wait on the host between forward and backward."""
    model = make_model("llama")
    forward = model.forward

    def offloaded(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return forward(*args, **kwargs)

    model.forward = offloaded
    return model


def by_deepspeed() -> nn.Module:
    """Blocks under DeepSpeed's own activation checkpointing."""
    model = make_model("llama")
    checkpointing.configure(None, partition_activations=False)
    for layer in model.model.layers:
        layer.forward = _checkpointed(layer.forward)
    model.enable_input_require_grads()
    return model


def _checkpointed(forward: Any) -> Any:
    def run(hidden: Tensor, **kwargs: Any) -> Any:
        return checkpointing.checkpoint(lambda x: forward(x, **kwargs), hidden)

    return run
