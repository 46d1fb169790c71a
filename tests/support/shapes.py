"""Models that are no plain decoder: recurrent and hybrid ones, rebuilt decoders, and those of other_kinds."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from piece_ds.models.eligible import make_eligible
from piece_ds.models.experts import gather_experts_whole
from support import tiled
from support.causal_classes import VOCAB, tiny_model
from support.models import make_model
from support.moe import frozen_routers, make_moe
from support.other_kinds import OTHER_KINDS, make_other, other_batches

# Recurrent and hybrid families, with everything that is no linear layer: A_log, D, dt_bias, conv1d, gates, RG-LRU.
RECURRENT = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "falcon_h1",
    "qwen3_next",
    "qwen3_5_text",
    "bamba",
    "jamba",
    "zamba",
    "zamba2",
    "recurrent_gemma",
    "lfm2",
    "rwkv",
    "olmo_hybrid",
)

# Experts have tests of their own: here a hybrid's blocks are dense.
_DENSE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_experts": 0, "mlp_only_layers": [0, 1]},
    "jamba": {"num_experts": 1, "num_experts_per_tok": 1},
}


def _frozen_parts() -> nn.Module:
    model = make_model("llama")
    for part in (model.model.layers[0], model.model.norm, model.model.layers[1].mlp.up_proj):
        part.requires_grad_(False)
    return model


def _shared_block() -> nn.Module:
    """One block stands for all, as in ALBERT."""
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    return model


def _frozen_shared_block() -> nn.Module:
    model = _shared_block()
    model.model.layers[0].mlp.gate_proj.requires_grad_(False)
    return model


def _resized(family: str, num_added: int) -> nn.Module:
    model = make_model(family)
    torch.manual_seed(21)
    model.resize_token_embeddings(model.config.vocab_size + num_added, mean_resizing=False)
    return model.train()


def _resized_padded() -> nn.Module:
    model = make_model("llama")
    torch.manual_seed(22)
    model.resize_token_embeddings(model.config.vocab_size + 3, pad_to_multiple_of=8, mean_resizing=False)
    return model.train()


def _tied_after_the_fact() -> nn.Module:
    model = make_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _biases_alone() -> nn.Module:
    torch.manual_seed(23)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=20,
        intermediate_size=33,
        num_hidden_layers=2,
        num_attention_heads=5,
        head_dim=4,
        attention_bias=True,
        mlp_bias=True,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).train()
    for name, param in model.named_parameters():
        param.requires_grad_(name.endswith("bias"))
    return model


class _Scalars(nn.Module):
    """A decoder with parameters of one element and of four dimensions, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = make_model("llama")
        self.config = self.decoder.config
        torch.manual_seed(24)
        self.temperature = nn.Parameter(torch.tensor([0.7]))
        self.kernel = nn.Parameter(torch.randn(2, 3, 1, 2) * 0.2)
        self.unused = nn.Parameter(torch.randn(3, 5))

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def forward(self, labels: Tensor, **inputs: Tensor) -> Any:
        output = self.decoder(**inputs)
        logits = output.logits * self.temperature + self.kernel.sum(dim=1).std()
        flat = logits[:, :-1].reshape(-1, logits.shape[-1])
        output.loss = nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1)) + self.kernel.square().sum()
        return output


def _t5() -> nn.Module:
    torch.manual_seed(25)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=20,
        d_kv=4,
        d_ff=33,
        num_layers=2,
        num_heads=5,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).train()


def _listed_experts() -> nn.Module:
    """Experts in a list, which ZeRO-3 gathers with the block around them."""
    model = frozen_routers(make_moe("listed"))
    gather_experts_whole(model)
    # Something after the block, so that recomputing it goes to the block's end.
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: out + out.tanh())
    return model


REBUILT: dict[str, Callable[[], nn.Module]] = {
    "frozen-parts": _frozen_parts,
    "shared-block": _shared_block,
    "frozen-shared-block": _frozen_shared_block,
    "resized": lambda: _resized("llama", 5),
    "resized-tied": lambda: _resized("qwen3", 5),
    "resized-padded": _resized_padded,
    "shrunk": lambda: _resized("llama", -7),
    "tied-later": _tied_after_the_fact,
    "added-rows": lambda: _resized("llama", 5),
    "added-rows-tied": lambda: _resized("qwen3", 5),
    "biases-alone": _biases_alone,
    "scalars": _Scalars,
    "t5": _t5,
    "listed-experts": _listed_experts,
    "tiled-mlp": tiled.tiled_mlp,
    "tiled-loss": tiled.TiledLoss,
    "activations-on-host": tiled.on_the_host,
    "checkpointed-by-deepspeed": tiled.by_deepspeed,
}

# Shape -> what --eligible says of it: of the embeddings, the rows of added tokens alone.
ADDED_ROWS = dict.fromkeys(("added-rows", "added-rows-tied"), "model.embed_tokens.weight[97:]")
FIRST_ADDED = 97

SHAPES = (*RECURRENT, *REBUILT, *OTHER_KINDS)


def make_shape(name: str) -> nn.Module:
    """The model of that name, in training mode without dropout, the same at every call."""
    if name in OTHER_KINDS:
        model = make_other(name)
    else:
        model = REBUILT[name]() if name in REBUILT else tiny_model(name, **_DENSE.get(name, {})).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name in ADDED_ROWS:
        make_eligible(model, [ADDED_ROWS[name]])
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def shape_batches(shape: str, num: int) -> list[dict[str, Tensor]]:
    """Micro-batches of two rows and different lengths, without padding: how models pad is tested elsewhere."""
    if shape in OTHER_KINDS:
        return other_batches(shape, num)
    generator = torch.Generator().manual_seed(6)
    batches = []
    for b in range(num):
        ids = torch.randint(5, VOCAB - 8, (2, 6 + 3 * (b % 4)), generator=generator)
        if shape in ADDED_ROWS:
            ids[:, 1::3] = torch.randint(FIRST_ADDED, FIRST_ADDED + 5, ids[:, 1::3].shape, generator=generator)
        labels = ids.clone()
        labels[:, :2] = -100
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return batches


def embedding_of(model: nn.Module) -> str | None:
    """The name of the input embedding, which may not be selected; None of a model that reads no tokens."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    (name,) = (name for name, param in model.named_parameters() if param is weight)
    return name
