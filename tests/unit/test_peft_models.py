"""A model with an adapter of PEFT, or with nothing to select, is refused by every call that a loop begins with."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support.models import make_micro_batches, make_model
from torch import nn

from piece_ds import attach, collect_statistics, estimate_mask, layout_of, prepare_compact, select
from piece_ds.runtime.errors import UserError


def wrapped() -> nn.Module:
    return get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"], r=2))


def with_prompt() -> nn.Module:
    return get_peft_model(make_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def inside() -> nn.Module:
    """The model that get_peft_model() has changed, without the wrapper."""
    return wrapped().base_model.model


def in_a_part() -> nn.Module:
    """A user's own module around a wrapped model."""
    return nn.ModuleDict({"language": wrapped()})


MODELS = {
    wrapped: r"got PeftModel, whose adapter trains instead of them \('default': LORA\): call merge_and_unload\(\)",
    with_prompt: r"got PeftModelForCausalLM, whose adapter .* \('default': PROMPT_TUNING\)",
    inside: r"'model.layers.0.self_attn.q_proj' of this LlamaForCausalLM has an adapter of PEFT \('default': LORA\)",
    in_a_part: r"'language' of this ModuleDict has an adapter of PEFT \('default': LORA\)",
}


def engine_of(model: nn.Module) -> Any:
    return SimpleNamespace(module=model, device="cpu")


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "prepare_compact": lambda model: prepare_compact(model, ratio=0.01),
    "estimate_mask": lambda model: estimate_mask(engine_of(model), make_micro_batches(), method="random"),
    "collect_statistics": lambda model: collect_statistics(engine_of(model), make_micro_batches()),
    "attach": lambda model: attach(engine_of(model), cast(Any, None)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_with_an_adapter_is_refused_as_it_is(make: Callable[[], nn.Module], call: str) -> None:
    model = make()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=rf"^{call}\(\) selects among the model's own weights.*{MODELS[make]}"):
        CALLS[call](model)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_model_whose_adapter_has_been_merged_is_taken() -> None:
    prepare_compact(cast(Any, wrapped()).merge_and_unload().requires_grad_(True), ratio=0.01)


@pytest.mark.parametrize("given", [{"ratio": 0.01}, {"num_selected": 3}, {"ratio": 0.01, "exclude": "*"}])
def test_a_model_with_nothing_to_select_is_refused(given: dict[str, Any]) -> None:
    """DeepSpeed would end in an index error or an empty assertion, from a parameter without elements."""
    model = make_model("llama").requires_grad_("exclude" in given)
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=r"no eligible parameter: each of its \d+ is frozen, .* or exclude fewer"):
        prepare_compact(model, **given)
    assert [name for name, _ in model.named_parameters()] == names
    if "exclude" not in given:
        with pytest.raises(UserError, match="no eligible parameter"):
            select(layout_of(model), "random", 0.01)
