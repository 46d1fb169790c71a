"""Loading models and tokenizers: dtypes, what is frozen, and what cannot be loaded."""

from pathlib import Path

import pytest
import torch
from support.launches import make_model_folder
from support.models import FAMILIES, embedding_name, make_model
from transformers import AutoConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from piece_ds.config.arguments import ModelArguments
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import (
    dtype_of,
    empty_layout,
    freeze_ineligible,
    load_config,
    load_model,
    load_tokenizer,
    require_weights,
)
from piece_ds.runtime.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("bf16"), torch.bfloat16)


def arguments(path: Path, dtype: str = "auto") -> ModelArguments:
    return ModelArguments(model_name_or_path=str(path), dtype=dtype)


@pytest.mark.parametrize(
    ("asked", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)]
)
def test_dtype_is_that_of_the_files_unless_asked_otherwise(folder: Path, asked: str, expected: torch.dtype) -> None:
    config = load_config(arguments(folder, asked))
    dtype = dtype_of(arguments(folder, asked), config)
    assert dtype == expected
    assert {param.dtype for param in load_model(arguments(folder, asked), dtype).parameters()} == {expected}


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_without_weights_is_that_of_the_model(tmp_path: Path, family: str) -> None:
    make_model(family).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    empty, real = empty_layout(arguments(tmp_path), config), layout_of(load_model(arguments(tmp_path), torch.float32))
    assert [(info.name, tuple(info.shape)) for info in empty.parameters] == [
        (info.name, tuple(info.shape)) for info in real.parameters
    ]


def test_layout_without_weights_can_be_had_while_zero3_is_configured(folder: Path) -> None:
    zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    assert empty_layout(arguments(folder), load_config(arguments(folder))).total > 0
    assert is_deepspeed_zero3_enabled()
    del zero3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_input_embedding_alone_is_frozen(family: str) -> None:
    model = make_model(family)
    freeze_ineligible(model)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert frozen == {embedding_name(family)}


def test_with_a_mask_everything_it_leaves_out_is_frozen() -> None:
    model = make_model("llama")
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    freeze_ineligible(model, names)
    assert {name for name, param in model.named_parameters() if param.requires_grad} == names


def test_what_cannot_be_loaded_is_refused_in_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    calls = {
        "no model can be loaded from there": lambda: load_config(arguments(tmp_path / "none")),
        "the folder holds no tokenizer": lambda: load_tokenizer(arguments(tmp_path)),
        "the folder holds no weights": lambda: require_weights(arguments(tmp_path)),
        "cannot be read": lambda: load_model(arguments(tmp_path), torch.float32),
    }
    for message, call in calls.items():
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused_in_one_line(tmp_path: Path, folder: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    require_weights(arguments(tmp_path))
    with pytest.raises(UserError, match="cannot be read"):
        load_model(arguments(tmp_path), torch.bfloat16)


def test_names_of_the_hub_are_not_taken_for_folders() -> None:
    require_weights(ModelArguments(model_name_or_path="somebody/some-model"))
