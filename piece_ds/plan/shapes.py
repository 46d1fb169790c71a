"""The sizes of a model that decide memory and traffic, from its configuration only."""

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from piece_ds.models.eligible import input_embedding
from piece_ds.models.experts import expert_blocks, experts_of, stacked_experts
from piece_ds.models.layout import full_shape, layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout

# Published configurations, reduced to what decides shapes.
_QWEN = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "1.5B": ("Qwen2", _QWEN),
    "8B": (
        "Llama",
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    ),
    "70B": (
        "Llama",
        {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    ),
    "405B": (
        "Llama",
        {
            **_LLAMA,
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
        },
    ),
}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, in elements unless said otherwise.

    Attributes:
        total: of the model, with tied parameters counted once.
        eligible: elements that may be selected.
        largest: of the largest eligible parameter.
        linear_edges: sum of rows + columns of all Linear modules but a head. LoRA adds rank times as many elements.
        hidden: width, for activations and DeepSpeed's bucket sizes.
        layers: number of blocks.
        vocab: number of token ids.
        experts: what a mixture of experts adds; None for other models.
        formed_whole: of the largest eligible parameter that is neither a linear layer's weight nor stacked experts: its
            gradient is formed whole even if others are sampled.
        products: (elements of a linear layer's weight or of stacked experts, elements of one matrix of them), each pair
            once: their gradients are sampled if that is faster (ops.sampling_rule).
    """

    total: int
    eligible: int
    largest: int
    linear_edges: int
    hidden: int
    layers: int
    vocab: int
    experts: "ExpertShape | None" = None
    formed_whole: int = 0
    products: tuple[tuple[int, int], ...] = ()

    @property
    def active(self) -> int:
        """Elements that one token uses."""
        return self.total - (self.experts.idle if self.experts else 0)

    @property
    def together(self) -> int:
        """Most elements that ZeRO-3 gathers at once, and whose gradients wait for each other: a layer's experts."""
        return max(self.largest, self.experts.block if self.experts else 0)


@dataclass(frozen=True)
class ExpertShape:
    """Sizes of a mixture of experts.

    Attributes:
        number: of experts in a layer, the most of all layers.
        per_token: experts that a token is routed to.
        width: inner width of one expert, if it has three matrices, as gated ones do.
        block: elements of the largest module that holds experts, with everything in it.
        idle: elements of the model that one token does not use.
    """

    number: int
    per_token: int
    width: int
    block: int
    idle: int


# What configurations call the number of experts that a token is routed to.
_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")


def known_config(name: str) -> Any:
    """Return transformers' configuration of a model in KNOWN: Qwen2.5-1.5B, Llama-3.1-8B, -70B and -405B."""
    import transformers

    kind, values = KNOWN[name]
    return getattr(transformers, f"{kind}Config")(**values)


def shape_of(model: nn.Module) -> ModelShape:
    """Return the sizes of a model, which may be on the meta device."""
    layout = layout_of(model)
    text = model.config.get_text_config()
    embedding = input_embedding(model)
    head = model.get_output_embeddings()
    # LoRA leaves out the head, and a head that is the embedding.
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head and m.weight is not embedding]
    return ModelShape(
        total=layout.total,
        eligible=layout.num_eligible,
        largest=max(info.numel for info in layout.eligible()),
        linear_edges=sum(sum(full_shape(m.weight)) for m in linear),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        vocab=text.vocab_size,
        experts=_expert_shape(model, text),
        **_by_formula(model, layout),
    )


def _expert_shape(model: nn.Module, text: Any) -> ExpertShape | None:
    """Return the sizes of a mixture of experts; None if model is none."""
    blocks = [module for _, module in expert_blocks(model)]
    # Per group of experts: how many, and elements of one.
    groups = [(number, numel // number) for number, numel in map(experts_of, blocks) if number]
    if not groups:
        return None
    number, one = max(groups)
    # A configuration that does not say so may route to all of them.
    per_token = next((getattr(text, name) for name in _PER_TOKEN if isinstance(getattr(text, name, None), int)), number)
    if not 1 <= per_token <= number:
        raise UserError(f"its config.json says {number} experts, of which a token would see {per_token}: mend it")
    return ExpertShape(
        number=number,
        per_token=per_token,
        width=one // (3 * text.hidden_size),
        block=max(sum(int(_numel(param)) for param in block.parameters()) for block in blocks),
        idle=sum(max(0, number - per_token) * one for number, one in groups),
    )


def _by_formula(model: nn.Module, layout: Layout) -> dict[str, Any]:
    """Return ModelShape's `formed_whole` and `products`: whether single entries of a gradient have a formula."""
    linear = {f"{name}.weight" for name, m in model.named_modules() if type(m) in (nn.Linear, Conv1D)}
    stacks = set(stacked_experts(model))
    formed_whole, products = 0, set()
    for info in layout.eligible():
        if info.name in linear or (info.name.rpartition(".")[0] in stacks and len(info.shape) == 3):
            products.add((info.numel, prod(info.shape[-2:])))
        else:
            formed_whole = max(formed_whole, info.numel)
    return {"formed_whole": formed_whole, "products": tuple(sorted(products))}


def _numel(param: nn.Parameter) -> int:
    return prod(full_shape(param))
