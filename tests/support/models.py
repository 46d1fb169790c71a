"""Tiny models of every architecture family under test, with sizes that divide by nothing, and data for them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutput

from support import vision

VOCAB = 97
FAMILIES = ("llama", "qwen3", "gemma2", "neox")
MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "listed")
NUM_MICRO_BATCHES = 7  # divides by neither 2 nor 3


def make_model(family: str, dropout: float = 0.0) -> nn.Module:
    """The same weights at every call. No length of a norm divides by 2 or 3, so that ZeRO pads it."""
    torch.manual_seed(11)
    shared = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": 64, "attention_dropout": dropout}
    # Weights large enough for gradients that differ: at the default 0.02 the tiny models are nearly linear.
    shared["initializer_range"] = 0.2
    heads = {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 4}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(hidden_size=35, intermediate_size=61, **heads, **shared)).train()
    if family == "qwen3":  # q_norm and k_norm of 4 elements: the third of three ranks owns nothing of them
        config = Qwen3Config(hidden_size=25, intermediate_size=37, tie_word_embeddings=True, **heads, **shared)
        return Qwen3ForCausalLM(config).train()
    if family == "gemma2":
        config = Gemma2Config(
            hidden_size=35,
            intermediate_size=41,
            tie_word_embeddings=True,
            query_pre_attn_scalar=4,
            sliding_window=8,
            **heads,
            **shared,
        )
        return Gemma2ForCausalLM(config).train()
    if family == "neox":
        config = GPTNeoXConfig(
            hidden_size=35,
            intermediate_size=47,
            num_attention_heads=5,
            rotary_pct=0.6,
            hidden_dropout=dropout,
            **shared,
        )
        return GPTNeoXForCausalLM(config).train()
    if family == "gpt2":  # its linear layers keep their weights transposed
        return GPT2LMHeadModel(
            GPT2Config(
                n_embd=35,
                n_head=5,
                n_layer=2,
                n_positions=64,
                vocab_size=VOCAB,
                initializer_range=0.2,
                attn_pdrop=dropout,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
            )
        ).train()
    if family == "branches":
        return Branches()
    if family in vision.FAMILIES:
        return vision.make_vision_model(family)
    if family in MIXTURES:
        from support.moe import make_moe  # takes sizes from here

        return make_moe(family)
    raise ValueError(family)


class Branches(nn.Module):
    """Uses `optional` only where a micro-batch says so, and has a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.inlet = nn.Linear(5, 5)
        self.body = Body()
        self.last = nn.Linear(7, 1)

    def forward(self, x: Tensor, use_optional: Tensor) -> CausalLMOutput:
        return CausalLMOutput(loss=self.last(self.body(self.inlet(x), use_optional)).square().mean())


class Body(nn.Module):
    """The part whose parameters ZeRO-3 must gather together, because ranks may run different branches of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.optional = nn.Linear(7, 7)

    def forward(self, x: Tensor, use_optional: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return hidden + self.optional(hidden).tanh() if bool(use_optional) else hidden


def make_micro_batches(family: str = "llama", num: int = NUM_MICRO_BATCHES) -> list[dict[str, Tensor]]:
    """Micro-batches of two rows and different lengths, the shorter row padded on the left."""
    if family in vision.FAMILIES:
        return vision.vision_micro_batches(family, num)
    generator = torch.Generator().manual_seed(5)
    if family == "branches":
        return [
            {"x": torch.randn(3, 5, generator=generator), "use_optional": torch.tensor(b % 3 == 1)} for b in range(num)
        ]
    batches = []
    for b in range(num):
        length, padding = 5 + 3 * (b % 4), 1 + b % 3
        ids = torch.randint(1, VOCAB, (2, length), generator=generator)
        attention = torch.ones_like(ids)
        attention[1, :padding] = 0
        ids[1, :padding] = 0
        labels = ids.masked_fill(attention == 0, -100)
        labels[:, :2] = -100  # a prompt
        batches.append({"input_ids": ids, "attention_mask": attention, "labels": labels})
    return batches


def embedding_name(family: str) -> str | None:
    """The parameter that may not be selected, by hand."""
    of = {"neox": "gpt_neox.embed_in.weight", "branches": None} | dict.fromkeys(vision.FAMILIES, vision.EMBEDDING)
    return of.get(family, "model.embed_tokens.weight")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters in dtype; buffers (rotary frequencies) stay in fp32, as under DeepSpeed."""
    for param in model.parameters():
        param.data = param.data.to(dtype)
    return model


class PlainEngine(nn.Module):
    """A model with what a forward pass asks of an engine."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module, self.device = model, torch.device("cpu")

    def forward(self, **batch: Tensor) -> Any:
        return self.module(**batch)


def moved(model: nn.Module) -> nn.Module:
    """Return the model with every weight moved a little, the same at every call."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn(param.shape, generator=generator))
    return model
