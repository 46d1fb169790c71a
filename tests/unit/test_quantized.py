"""A quantized model is refused by name at every door of the library, before it is changed."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from support.models import make_micro_batches, make_model
from torch import Tensor, nn

from piece_ds import collect_statistics, estimate_mask, prepare_compact
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.selected_values import selected_values


class Scaled(Tensor):
    """As torchao and Transformer Engine keep weights: a subclass that says it is bf16."""


def stored_as(dtype: torch.dtype) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.requires_grad_(False)
        weight.data = weight.data.to(dtype)

    return change


def four_bits(model: nn.Module) -> None:
    """As bitsandbytes keeps them: bytes, two weights in each, flat."""
    layer = model.model.layers[1].self_attn.q_proj
    packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
    layer.weight = nn.Parameter(packed, requires_grad=False)


def subclass(model: nn.Module) -> None:
    layer = model.model.layers[1].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Scaled))


def by_transformers(model: nn.Module) -> None:
    """As GPTQ models come: their weights are buffers, and only transformers' quantizer says what they are."""
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))


KINDS = {
    "int8": (stored_as(torch.int8), "'model.layers.0.mlp.up_proj.weight' is stored as torch.int8"),
    "fp8": (stored_as(torch.float8_e4m3fn), "is stored as torch.float8_e4m3fn"),
    "4 bits": (four_bits, "'model.layers.1.self_attn.q_proj.weight' is stored as torch.uint8"),
    "subclass": (subclass, "is a Scaled, expected a plain tensor"),
    "gptq": (by_transformers, r"LlamaForCausalLM is quantized \(gptq\)"),
}


def engine_of(model: nn.Module) -> SimpleNamespace:
    """As much of an engine as is looked at before the model is."""
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad])
    engine = type("DeepSpeedEngine", (SimpleNamespace,), {})
    return engine(
        module=model,
        device=torch.device("cpu"),
        optimizer=optimizer,
        basic_optimizer=optimizer,
        _config=SimpleNamespace(_param_dict={}),
        zero_optimization_stage=lambda: 0,
        is_deepcompile_active=lambda: False,
        autotp_size=lambda: 0,
    )


def test_every_door_refuses_every_kind() -> None:
    doors: dict[str, Callable[[nn.Module], object]] = {
        "layout": layout_of,
        "compact mode": lambda model: prepare_compact(model, ratio=0.01),
        "statistics": lambda model: collect_statistics(engine_of(model), make_micro_batches(num=1)),
        "selection": lambda model: estimate_mask(engine_of(model), [], method="magnitude", ratio=0.01),
    }
    for change, message in KINDS.values():
        model = make_model("llama")
        change(model)
        before = {name: param.requires_grad for name, param in model.named_parameters()}
        for door in doors.values():
            with pytest.raises(UserError, match=message) as caught:
                door(model)
            assert "\n" not in str(caught.value)
            assert "dequantize" in str(caught.value)
        assert {name: param.requires_grad for name, param in model.named_parameters()} == before
        assert selected_values(model) is None


def test_floating_weights_of_several_dtypes_are_none_of_them() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert layout_of(make_model("llama").to(dtype)).num_eligible
