"""Experts and routers are found in every model type; routers are selected only if the user says so."""

import logging

import pytest
import torch
from support.causal_classes import tiny_model
from support.models import make_micro_batches
from support.moe import EMBEDDING, FAMILIES, STACKED, is_router, make_moe
from torch import nn

from piece_ds.config.arguments import ModelArguments
from piece_ds.evaluation.batches import evaluating
from piece_ds.models.eligible import ineligible, make_eligible
from piece_ds.models.experts import gather_experts_whole, router_names, stacked_experts, unmarked_lists
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import check_eligible, freeze_ineligible
from piece_ds.preflight.checks import warn_of_stacked_experts
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import layer_of
from piece_ds.update.attach import prepare_compact

# Model type -> the end of the names of its routers' parameters, read off transformers' sources.
ROUTERS = {
    "mixtral": ["mlp.gate.weight"],
    "qwen2_moe": ["mlp.gate.weight", "mlp.shared_expert_gate.weight"],
    "qwen3_5_moe_text": ["mlp.gate.weight", "mlp.shared_expert_gate.weight"],
    "gpt_oss": ["mlp.router.weight", "mlp.router.bias"],
    "deepseek_v3": ["mlp.gate.weight"],
    "glm4_moe": ["mlp.gate.weight"],
    "llama4_text": ["feed_forward.router.weight"],
    "jamba": ["feed_forward.router.weight"],
    "nemotron_h": ["mixer.gate.weight"],
    "granitemoehybrid": ["block_sparse_moe.router.weight"],
    "hunyuan_v1_moe": ["mlp.gate.wg.weight"],
    "afmoe": ["mlp.router.gate.weight"],
    "longcat_flash": ["mlp.router.classifier.weight"],
    "jetmoe": ["mlp.router.layer.weight", "self_attention.experts.router.layer.weight"],
    # Its router is a small network.
    "zaya": [
        *("mlp.gate.down_proj.weight", "mlp.gate.down_proj.bias", "mlp.gate.router_mlp.norm.weight"),
        *(f"mlp.gate.router_mlp.{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")),
        *("mlp.gate.router_mlp.out_proj.weight", "mlp.gate.router_states_scale"),
    ],
    # No mixture of experts: gates of other kinds, and a router between copies of the hidden state.
    "qwen3": [],
    "qwen3_5_text": [],
    "gemma3n_text": [],
    "recurrent_gemma": [],
}


def test_routers_of_every_kind_are_found_and_nothing_else() -> None:
    for model_type, ends in ROUTERS.items():
        with torch.device("meta"):
            model = tiny_model(model_type)
        found = router_names(model)
        assert {name.partition("layers.")[2].partition(".")[2] for name in found} == set(ends), model_type
        assert bool(stacked_experts(model)) == bool(ends), model_type


def test_routers_are_frozen_unless_the_user_names_them() -> None:
    for family in FAMILIES:
        model = make_moe(family)
        routers = {name for name, _ in model.named_parameters() if is_router(name)}
        assert routers
        assert {info.name for info in layout_of(model).parameters if not info.eligible} == routers | {EMBEDDING}
        freeze_ineligible(model)
        assert {name for name, param in model.named_parameters() if not param.requires_grad} == routers | {EMBEDDING}
        assert set(make_eligible(model, ["*.gate.*" if family != "gpt-oss" else "*.router.*"])) == routers
        assert ineligible(model) == {EMBEDDING}


def test_what_is_eligible_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_eligible(ModelArguments(model_name_or_path="x"), make_moe("mixtral").config)
    said = "eligible: 16272 of 18840 parameters; not: 2328 of the input embeddings, 240 of routers, 0 others"
    assert said in caplog.text
    with pytest.raises(UserError, match="is already"):
        make_eligible(make_moe("mixtral"), ["*experts*"])


def test_lists_of_experts_are_gathered_whole_and_stacked_ones_need_not_be() -> None:
    for family in STACKED:
        assert gather_experts_whole(make_moe(family)) == []
        assert unmarked_lists(make_moe(family)) is None
    model = make_moe("listed")
    assert unmarked_lists(model) == "model.layers.0.mlp"
    assert gather_experts_whole(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    other = make_moe("listed")
    prepare_compact(other, 0.1)
    assert other.get_submodule("model.layers.1.mlp")._z3_leaf


def test_a_module_that_is_called_and_holds_a_list_is_the_one_that_is_gathered() -> None:
    """As the experts of Switch: a dictionary with a forward of its own."""

    class Experts(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self["one"](x)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(3, 2)
            self.experts = Experts({"one": nn.Linear(3, 3), "two": nn.Linear(3, 3)})

    model = nn.Sequential(Block())
    assert gather_experts_whole(model) == ["0.experts"]
    assert router_names(model) == {"0.router.weight", "0.router.bias"}


def test_the_load_balancing_loss_counts_in_training_and_not_in_evaluation() -> None:
    batch = make_micro_batches()[0]
    for family in ("mixtral", "qwen3-moe", "gpt-oss"):
        model, plain = make_moe(family, aux_loss=True), make_moe(family)
        token_loss = plain(**batch).loss
        assert model(**batch).loss > token_loss + 0.1
        with evaluating(model):
            assert model(**batch).loss == token_loss
            model.generate(batch["input_ids"][:1], max_new_tokens=2, do_sample=False)
        assert model.config.output_router_logits is True
        assert plain.config.output_router_logits is False


def test_methods_of_linear_layers_say_what_they_leave_out(caplog: pytest.LogCaptureFixture) -> None:
    config = make_moe("mixtral").config
    for method in ("lift", "shira", "migu", "lora", "o-lora"):
        caplog.clear()
        warn_of_stacked_experts(method, "element", config, False)
        assert f"--method {method} acts on linear layers: it leaves the stacked experts out, 61.1 %" in caplog.text
    caplog.clear()
    for method in ("piece-s", "piece-ratio", "magnitude", "seqft"):
        warn_of_stacked_experts(method, "element", config, False)
    warn_of_stacked_experts("lift", "element", make_moe("listed").config, False)
    assert not caplog.text
    warn_of_stacked_experts("piece-s", "column", config, False)
    assert "--unit column is of matrices: the stacked experts, 61.1 % of the model's weights, compete by element" in (
        caplog.text
    )


def test_experts_share_the_budget_of_their_block() -> None:
    for name, layer in (
        ("model.layers.3.mlp.experts.0.down_proj.weight", "model.layers.3"),
        ("model.layers.12.mlp.experts.down_proj", "model.layers.12"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
        ("lm_head.weight", "other"),
    ):
        assert layer_of(name) == layer
