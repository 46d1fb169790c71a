"""The sizes of a model that decide memory and traffic, from its configuration only."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from piece_ds.models.eligible import input_embedding
from piece_ds.models.layout import full_shape, layout_of

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
    """

    total: int
    eligible: int
    largest: int
    linear_edges: int
    hidden: int
    layers: int
    vocab: int


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
    )
