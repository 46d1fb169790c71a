"""--method peft: what a file may say, and that a merged model says what the adapted one says, for every type."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from piece_ds.config.method_arguments import BaselineArguments
from piece_ds.config.settings import parse
from piece_ds.methods.any_peft import AnyPeft, merged_model
from piece_ds.methods.lora import FOLDER, LoRA
from piece_ds.methods.peft_config import PROVEN, read_peft_config
from piece_ds.preflight.checks import check_sources
from piece_ds.runtime.errors import UserError
from piece_ds.zero.whole_state import whole_state

pytestmark = pytest.mark.heavy

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
# What a type needs to fit into the small model, besides its target modules.
NEEDED: dict[str, dict[str, Any]] = {
    "OFT": {"oft_block_size": 8, "r": 0},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "FOURIERFT": {"n_frequency": 20},
    "WAVEFT": {"n_frequency": 16},
    "C3A": {"block_size": 16},
    "VBLORA": {"num_vectors": 16, "vector_length": 16},
    "VERA": {"target_modules": ["q_proj"]},
    "ROAD": {"group_size": 8},
} | {name: {"r": 4} for name in ("MISS", "SHIRA", "PSOFT")}
CASES = {name: {"peft_type": name, "target_modules": PROJECTIONS, **NEEDED.get(name, {})} for name in PROVEN}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-by-iteration": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "mica": {"init_lora_weights": "mica"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [1, 2]},
    "parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "everywhere": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 4}},
}
CASES |= {name: {"peft_type": "LORA", "target_modules": PROJECTIONS, **more} for name, more in VARIANTS.items()}
IDS = torch.arange(24).view(2, 12)


def small_model(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(11)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2, tie_word_embeddings=tied)).to(dtype)


def written(folder: Path, content: Any) -> BaselineArguments:
    path = folder / "peft.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return BaselineArguments(peft_config=str(path))


def adapted(method: LoRA, previous: Path | None = None, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(3)  # as a stream sets it before it adapts
    model = method.adapt(small_model(dtype), 1, previous)
    assert isinstance(model, PeftModel)
    return model


def trained_(model: nn.Module) -> nn.Module:
    """Change whatever trains, by a tenth."""
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        if param.requires_grad:
            param.data += 0.1 * torch.randn(param.shape, generator=generator)
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """As a run collects it: what has several names (VeRA's projections, tied weights) stands under one of them."""
    state = whole_state(SimpleNamespace(module=model, device=torch.device("cpu")))
    return {name: tensor.clone() for name, tensor in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_merged_model_and_the_resumed_one_say_what_the_adapted_one_says(name: str, tmp_path: Path) -> None:
    method, environment = AnyPeft(written(tmp_path, CASES[name])), dict(os.environ)
    model = trained_(adapted(method))
    want, plain = model(IDS).logits, small_model().eval()(IDS).logits
    assert float((want - plain).abs().max()) > 0.05
    method.save_model(model, state_of(model), SimpleNamespace(folder=tmp_path), tmp_path / "model")  # type: ignore[arg-type]
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert (tmp_path / FOLDER / "adapter_config.json").is_file()
    torch.testing.assert_close(adapted(method, tmp_path).eval()(IDS).logits, want, rtol=1e-5, atol=1e-5)
    for variable in ("CC", "CXX"):  # BOFT names compilers, which would compile what comes later
        assert os.environ.get(variable) == environment.get(variable), variable


def test_lora_by_file_is_method_lora(tmp_path: Path) -> None:
    flags = {"target_modules": "all-linear", "r": 8, "lora_alpha": 32, "lora_dropout": 0.1}
    by_file = adapted(AnyPeft(written(tmp_path, {"peft_type": "LORA", **flags})))
    by_flags = adapted(LoRA(BaselineArguments()))
    assert {n: p.requires_grad for n, p in by_file.named_parameters()} == {
        n: p.requires_grad for n, p in by_flags.named_parameters()
    }
    for name, tensor in by_flags.state_dict().items():
        assert torch.equal(tensor, by_file.state_dict()[name]), name
    one, other = (model.peft_config["default"].to_dict() for model in (by_file, by_flags))
    assert one == other


@torch.no_grad()
def test_weights_are_merged_in_fp32_and_rounded_once_to_the_models_dtype(tmp_path: Path) -> None:
    method = AnyPeft(written(tmp_path, CASES["LORA"]))
    model = trained_(adapted(method, dtype=torch.bfloat16))
    merged = dict(merged_model(model, state_of(model), method.config).named_parameters())
    assert {param.dtype for param in merged.values()} == {torch.bfloat16}
    name = "model.layers.1.self_attn.q_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    a, b = (getattr(layer, f"lora_{x}")["default"].weight.float() for x in "AB")
    want = layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)
    torch.testing.assert_close(merged[f"{name}.weight"].float(), want, rtol=2**-8, atol=1e-6)


@torch.no_grad()
def test_a_merge_takes_tied_weights_under_one_name_and_names_a_weight_that_is_not_there(tmp_path: Path) -> None:
    method = AnyPeft(written(tmp_path, CASES["LORA"]))
    model = trained_(method.adapt(small_model(tied=True), 1, None))
    state = state_of(model)
    assert sum("lm_head" in name or "embed_tokens" in name for name in state) == 1
    merged = merged_model(model, state, method.config)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    gone = next(name for name in state if "q_proj" in name)
    del state[gone]
    with pytest.raises(RuntimeError, match=re.escape(f"{gone!r} is not where PEFT expects it")):
        merged_model(model, state, method.config)


def test_a_file_in_yaml_or_as_peft_wrote_it_is_read(tmp_path: Path) -> None:
    method = AnyPeft(
        written(tmp_path, "peft_type: ia3\ntarget_modules: [q_proj, down_proj]\nfeedforward_modules: [down_proj]\n")
    )
    assert method.config.task_type == "CAUSAL_LM"
    model = adapted(method)
    model.save_pretrained(str(tmp_path / "saved"))
    again = read_peft_config(str(tmp_path / "saved" / "adapter_config.json"))
    assert not again.inference_mode
    assert again.target_modules == method.config.target_modules


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"peft_type": "LORAA"}, r"'LORAA' is unknown; usable: LORA, .*Did you mean 'LORA'"),
        ({}, "peft_type None is unknown"),
        ({"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING' is not proven to merge"),
        ({"peft_type": "LILY"}, "'LILY' is not proven to merge"),
        ({"peft_type": "LORA", "lora_rank": 4}, "LORA has no key 'lora_rank'"),
        ({"peft_type": "LORA", "r": 4, "init_lora_weights": "eva"}, "'eva' is not proven, or needs a pass over data"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_"}, "'pissa_niter_' is not proven"),
        ({"peft_type": "LORA", "init_lora_weights": "olora2"}, "'olora2' is not proven"),
        ({"peft_type": "LORA", "init_lora_weights": "corda_mica"}, "'corda_mica' is not proven"),
        ({"peft_type": "LORA", "alora_invocation_tokens": [1]}, "alora_invocation_tokens is not proven"),
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, "'SEQ_CLS', expected CAUSAL_LM"),
        ({"peft_type": "IA3", "target_modules": ["a"], "feedforward_modules": ["b"]}, "PEFT refuses it: "),
        ("[1]", "must map PEFT's keys to values, got list"),
        ("{", "neither JSON nor YAML"),
        ("a: [", "neither JSON nor YAML"),
    ],
)
def test_files_that_cannot_be_used_are_refused_in_one_line(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        AnyPeft(written(tmp_path, content))
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "peft.json") in str(refusal.value)


def test_a_missing_file_and_a_missing_flag_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none[.]json cannot be read"):
        AnyPeft(BaselineArguments(peft_config=str(tmp_path / "none.json")))
    with pytest.raises(UserError, match="--method peft needs --peft_config FILE"):
        AnyPeft(BaselineArguments())
    with pytest.raises(UserError, match="--peft_config has no meaning with --method lora"):
        check_sources(parse(["--method", "lora", "--peft_config", "x.json"]), 1)


def test_an_adapter_that_does_not_fit_the_model_or_cannot_be_merged_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"does not fit the model: .*nothing_like_it"):
        adapted(AnyPeft(written(tmp_path, {"peft_type": "LORA", "target_modules": ["nothing_like_it"]})))
    monkeypatch.setattr("piece_ds.methods.peft_config._REFUSED", ())
    with pytest.raises(UserError, match=r"q_proj cannot be merged: .*lora_bias"):
        adapted(AnyPeft(written(tmp_path, {"peft_type": "LORA", "target_modules": ["q_proj"], "lora_bias": True})))


def test_a_stream_goes_on_only_with_the_file_that_it_began_with(tmp_path: Path) -> None:
    model = adapted(AnyPeft(written(tmp_path, CASES["LORA"])))
    model.save_pretrained(str(tmp_path / FOLDER))
    other = AnyPeft(written(tmp_path, CASES["LORA"] | {"lora_alpha": 99}))
    with pytest.raises(UserError, match="another --peft_config, which differs in lora_alpha"):
        adapted(other, tmp_path)
    with pytest.raises(UserError, match="does not hold an adapter"):
        adapted(other, tmp_path / "elsewhere")


def test_what_begins_with_whole_weights_is_refused_where_they_are_put_away(tmp_path: Path) -> None:
    for name in ("OSF", "LN_TUNING", "tokens"):
        model = small_model()
        model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks what it has partitioned
        with pytest.raises(UserError, match="begins with whole weights, which ZeRO-3 has put away: use ZeRO 0, 1 or 2"):
            AnyPeft(written(tmp_path, CASES[name])).adapt(model, 1, None)
