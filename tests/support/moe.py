"""Tiny mixtures of experts: stacked as transformers 5 has them, and a list of modules as other code has them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from support.models import VOCAB

STACKED = ("mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3")
FAMILIES = (*STACKED, "listed")
EMBEDDING = "model.embed_tokens.weight"
NUM_EXPERTS = 5

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    # Weights large enough for gradients that differ.
    "initializer_range": 0.2,
}


def make_moe(family: str, aux_loss: bool = False, experts: str | None = None) -> nn.Module:
    """The same weights at every call.

    aux_loss: config.json asks for the load-balancing loss. experts: how transformers multiplies; None means its choice.
    """
    torch.manual_seed(13)
    options = dict(_SHARED)
    if aux_loss:
        options |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    model: nn.Module
    if family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(intermediate_size=16, num_local_experts=NUM_EXPERTS, **options))
    elif family == "qwen3-moe":
        options |= {"moe_intermediate_size": 16, "num_experts": NUM_EXPERTS, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(intermediate_size=40, **options))
    elif family == "gpt-oss":
        options |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        model = GptOssForCausalLM(GptOssConfig(intermediate_size=16, num_local_experts=NUM_EXPERTS, **options))
    elif family == "deepseek-v3":
        options.pop("head_dim")
        options |= {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        options |= {"qk_nope_head_dim": 4, "v_head_dim": 4, "n_group": 1, "topk_group": 1, "n_routed_experts": 5}
        options |= {"first_k_dense_replace": 1, "num_hidden_layers": 3, "moe_intermediate_size": 16}
        model = DeepseekV3ForCausalLM(DeepseekV3Config(intermediate_size=40, n_shared_experts=1, **options))
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, NUM_EXPERTS))
    elif family == "listed":
        model = _listed(options)
    else:
        raise ValueError(family)
    # transformers starts routers, biases and sinks at 0 or without values: every tie would go one way.
    for name, param in model.named_parameters():
        if is_router(name) or name.endswith("bias") or "sinks" in name:
            nn.init.normal_(param, std=0.4)
    if experts is not None:
        model.set_experts_implementation(experts)
    return model.train()


class ListedBlock(nn.Module):
    """The block of models from before transformers stacked experts: each is a module, called if a token needs it."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, NUM_EXPERTS, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, width), nn.SiLU(), nn.Linear(width, hidden)) for _ in range(NUM_EXPERTS)
        )
        self.forced: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        if self.forced:
            chosen = torch.full_like(chosen, self.forced[0])
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            share = (weight * (chosen == number)).sum(-1, keepdim=True)
            taken = share.squeeze(-1) > 0
            out[taken] = out[taken] + share[taken] * self.experts[number](x[taken])
        return out


def _listed(options: dict[str, Any]) -> nn.Module:
    known = {name: value for name, value in options.items() if "expert" not in name and "router" not in name}
    model = LlamaForCausalLM(LlamaConfig(intermediate_size=40, **known))
    for layer in model.model.layers:
        layer.mlp = ListedBlock(known["hidden_size"], 16)
        for part in layer.mlp.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.2)
    return model


def force_routing(model: nn.Module) -> nn.Module:
    """Send all rows of a micro-batch to one expert, which its tokens name. Other ranks have other tokens."""
    chosen = [0]

    def choose(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        chosen[0] = int(kwargs["input_ids"].sum()) % NUM_EXPERTS

    def replace(module: nn.Module, args: Any, out: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return out[0], out[1], torch.full_like(out[2], chosen[0])

    model.register_forward_pre_hook(choose, with_kwargs=True)
    for module in model.modules():
        if isinstance(module, ListedBlock):
            module.forced = chosen
        elif type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(replace)
    return model


def is_router(name: str) -> bool:
    """By hand."""
    return ".gate." in name or ".router." in name


def frozen_routers(model: nn.Module) -> nn.Module:
    """For the oracle, which takes what requires a gradient."""
    for name, param in model.named_parameters():
        if is_router(name):
            param.requires_grad_(False)
    return model
