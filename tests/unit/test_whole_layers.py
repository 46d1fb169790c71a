"""Decoder layers that ZeRO-3 gathers as one: which are marked, and that undo leaves nothing."""

import torch
from deepspeed.utils import z3_leaf_module, z3_leaf_parameter
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from piece_ds import prepare_compact
from piece_ds.models import whole_layers
from piece_ds.models.whole_layers import gather_layers_whole, is_whole_layer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))


def marked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if z3_leaf_module(module)]


def test_layers_are_marked_and_nothing_else_until_undo() -> None:
    model = llama()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    undo = gather_layers_whole(model)
    assert marked(model) == ["model.layers.0", "model.layers.1"]
    for layer in model.model.layers:
        for param in layer.parameters():
            param.ds_z3_leaf_module = layer  # as an engine at ZeRO-3 does
    assert [name for name, module in model.named_modules() if is_whole_layer(module)] == marked(model)
    undo()
    assert marked(model) == []
    assert not any(z3_leaf_parameter(param) for param in model.parameters())
    assert not any(is_whole_layer(module) for module in model.modules())
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


def test_a_wrapped_model_is_looked_through() -> None:
    wrapped = nn.ModuleDict({"inner": llama()})
    gather_layers_whole(wrapped)
    assert marked(wrapped) == ["inner.model.layers.0", "inner.model.layers.1"]


def test_modules_that_name_no_layers_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    gather_layers_whole(model)
    assert marked(model) == []


def test_a_layer_stays_if_it_is_too_large_or_has_marks_of_its_own(monkeypatch) -> None:
    model = llama()
    model.model.layers[0].mlp._z3_leaf = True
    gather_layers_whole(model)
    assert marked(model) == ["model.layers.0.mlp", "model.layers.1"]

    monkeypatch.setattr(whole_layers, "MAX_NUMEL", 100)
    model = llama()
    gather_layers_whole(model)
    assert marked(model) == []


def test_layers_that_share_a_block_stay() -> None:
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **{**SIZES, "num_hidden_layers": 3}))
    model.model.layers[2].mlp = model.model.layers[0].mlp
    gather_layers_whole(model)
    assert marked(model) == ["model.layers.1"]


def test_stacked_experts_are_part_of_their_layer() -> None:
    model = MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=2, **SIZES))
    gather_layers_whole(model)
    assert "model.layers.1" in marked(model)


def test_the_first_argument_is_passed_by_place_and_outputs_are_the_same() -> None:
    class Layer(nn.Module):
        def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.weight * hidden_states * scale

    layer = Layer()
    layer.weight = nn.Parameter(torch.ones(3))
    model = nn.ModuleDict({"layer": layer})
    model._no_split_modules = ["Layer"]
    undo = gather_layers_whole(model)
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(len(args)))
    x = torch.arange(3.0)
    assert torch.equal(layer(hidden_states=x, scale=2.0), 2 * x)
    assert torch.equal(layer(x, scale=2.0), 2 * x)
    assert torch.equal(layer(x, 2.0), 2 * x)
    undo()
    layer(hidden_states=x)
    assert seen == [1, 1, 2, 0]


def test_a_layer_stays_marked_until_every_engine_is_gone() -> None:
    model = llama()
    first, second = gather_layers_whole(model), gather_layers_whole(model)
    first()
    assert marked(model) == ["model.layers.0", "model.layers.1"]
    second()
    assert marked(model) == []


def test_compact_mode_marks_layers() -> None:
    model = llama()
    values = prepare_compact(model, num_selected=3)
    assert marked(model) == ["model.layers.0", "model.layers.1"]
    values.leave(model)  # its engine may still evaluate
    assert marked(model) == ["model.layers.0", "model.layers.1"]
    assert values.after_engine is not None
    values.after_engine()
    assert marked(model) == []
