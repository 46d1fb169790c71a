"""Decoder layers that ZeRO-3 gathers as one: which are marked, and that undo leaves nothing."""

import pytest
import torch
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.utils import z3_leaf_module, z3_leaf_parameter
from deepspeed.utils.z3_leaf_module import apply_zero_leaf_module_config
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


def test_a_layer_stays_if_it_is_too_large_or_has_a_mark_of_its_own(monkeypatch) -> None:
    model = llama()
    model.model.layers[0]._z3_leaf = True
    undo = gather_layers_whole(model)
    assert [name for name, module in model.named_modules() if is_whole_layer(module)] == ["model.layers.1"]
    undo()
    assert marked(model) == ["model.layers.0"]

    monkeypatch.setattr(whole_layers, "MAX_NUMEL", 100)
    model = llama()
    gather_layers_whole(model)
    assert marked(model) == []


def test_layers_that_share_a_block_stay() -> None:
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **{**SIZES, "num_hidden_layers": 3}))
    model.model.layers[2].mlp = model.model.layers[0].mlp
    gather_layers_whole(model)
    assert marked(model) == ["model.layers.1"]


def test_an_engine_after_another_gathers_the_same_layers_of_a_mixture() -> None:
    """DeepSpeed marks Mixtral's blocks when it makes an engine, and never takes that off."""
    model = MixtralForCausalLM(MixtralConfig(num_key_value_heads=2, num_local_experts=2, **SIZES))
    for _ in range(2):
        undo = gather_layers_whole(model)
        assert [name for name, part in model.named_modules() if is_whole_layer(part)] == [
            "model.layers.0",
            "model.layers.1",
        ]
        apply_zero_leaf_module_config(model, DeepSpeedZeroLeafModuleConfig())
        undo()
    assert marked(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]


class Layer(nn.Module):
    """Stands for a layer of transformers; classes below replace its forward."""

    __module__ = "transformers.models"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.weight * hidden_states * scale


class KeywordsOnly(Layer):
    __module__ = "transformers.models"

    def forward(self, *, hidden_states: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.weight * hidden_states * scale


class AnyArguments(Layer):
    __module__ = "transformers.models"

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        (hidden_states,) = (*args, *kwargs.values())
        return self.weight * hidden_states


class OtherMethods(nn.Module):
    """Is never called: its parts are, by encode()."""

    __module__ = "transformers.models"

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class CodeOfOthers(Layer):
    """DeepSpeed may see none of what it returns."""


def holding(layer: nn.Module) -> nn.Module:
    model = nn.ModuleDict({"layer": layer})
    model._no_split_modules = [type(layer).__name__]
    return model


def test_layers_of_unknown_code_stay_and_those_that_are_not_called() -> None:
    for layer, expected in ((Layer(), ["layer"]), (OtherMethods(), []), (CodeOfOthers(), [])):
        model = holding(layer)
        gather_layers_whole(model)
        assert marked(model) == expected


def test_layers_that_take_arguments_by_name_alone_still_do() -> None:
    for layer in (KeywordsOnly(), AnyArguments()):
        gather_layers_whole(holding(layer))
        assert torch.equal(layer(hidden_states=torch.arange(3.0)), torch.arange(3.0))


def test_the_first_argument_is_passed_by_place_and_outputs_are_the_same() -> None:
    layer = Layer()
    model = holding(layer)
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


def test_a_failed_preparation_leaves_no_mark() -> None:
    """Otherwise the mended one would count every mark twice, and undo would take off one."""
    model = llama()
    for wrong in ({"num_selected": -1}, {"ratio": float("nan")}, {"ratio": 0.1, "unit": "element", "decays": 5}):
        with pytest.raises((ValueError, TypeError)):
            prepare_compact(model, **wrong)
        assert marked(model) == []
