"""A model folder whose files say what cannot be is refused in one line, before a weight is read or a folder claimed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.launches import make_model_folder
from torch import Tensor

from piece_ds.config.arguments import ModelArguments
from piece_ds.models.loading import dtype_of, load_config, load_model, load_tokenizer, require_weights
from piece_ds.models.suitable import check_checkpoint
from piece_ds.runtime.errors import UserError
from piece_ds.zero.finite_weights import refuse_nonfinite

# config.json: what is changed there -> what the line says.
CONFIGS: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": "32"},
    "'hidden_size' expected int, got float": {"hidden_size": 32.0},
    "expected int, got list": {"hidden_size": [32]},
    "hidden size (32) is not": {"num_attention_heads": 5},
    "describes no model (ZeroDivisionError": {"head_dim": 0},
    "describes no model (KeyError: 'nosuch')": {"hidden_act": "nosuch"},
    "got NoneType": {"hidden_act": None},
    "KeyError": {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 1.0}},
    "describes no model (TypeError": {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
    "float13": {"dtype": "float13"},
    "not a floating-point dtype": {"dtype": "int8"},
    "'max_position_embeddings' expected int, got str": {"max_position_embeddings": "x"},
    "Padding_idx must be within": {"pad_token_id": 99999},
    "'eos_token_id'": {"eos_token_id": "x"},
    "'attention_dropout'": {"attention_dropout": "x"},
    "'use_cache' expected bool": {"use_cache": "x"},
    "'initializer_range'": {"initializer_range": -1},
    "is quantized (an unknown method)": {"quantization_config": {}},
    "AttributeError: 'str' object has no attribute": {"quantization_config": "x"},
    "has no attribute 'items'": {"id2label": "x"},
    "has no attribute 'to_dict'": {"text_config": {}},
    "asks for num_hidden_layers 1e+06, which no model has": {"num_hidden_layers": 10**6},
    "asks for num_hidden_layers 0: a model has at least one layer": {"num_hidden_layers": 0},
    "asks for vocab_size 0: a model has at least one token": {"vocab_size": 0},
    "which config.json leaves out: they belong to a larger model": {"num_hidden_layers": 1},
    "the files lack 'model.layers.2": {"num_hidden_layers": 3},
    "says return_dict false": {"return_dict": False},
    "says output_attentions true": {"output_attentions": True},
    "says attention_dropout 2, expected a probability": {"attention_dropout": 2.0},
}
# tokenizer_config.json likewise.
TOKENIZERS: dict[str, dict[str, Any] | list[Any]] = {
    "has no attribute 'get'": [],
    "Special token eos_token has to be": {"eos_token": 5},
    "Missing [UNK]": {"tokenizer_class": "BertTokenizer"},
    "not supported between instances": {"model_max_length": "x"},
    "added_tokens_decoder": {"added_tokens_decoder": {"x": 5}},
    "Padding side": {"padding_side": "top"},
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("odd") / "good")


def read(folder: Path) -> None:
    """What every command reads of a model before its weights."""
    arguments = ModelArguments(model_name_or_path=str(folder))
    config = load_config(arguments)
    check_checkpoint(arguments, config)
    dtype_of(arguments, config)
    load_tokenizer(arguments, config)


def changed(good: Path, folder: Path, file: str, change: Any) -> Path:
    shutil.copytree(good, folder)
    content = json.loads((folder / file).read_text())
    content = {**content, **change} if isinstance(change, dict) else change
    (folder / file).write_text(json.dumps(content))
    return folder


def test_a_good_folder_is_read(good: Path) -> None:
    read(good)


def test_impossible_settings_are_refused_in_one_line(good: Path, tmp_path: Path) -> None:
    for file, cases in (("config.json", CONFIGS), ("tokenizer_config.json", TOKENIZERS)):
        for number, (said, change) in enumerate(cases.items()):
            folder = changed(good, tmp_path / f"{file}-{number}", file, change)
            with pytest.raises(UserError) as error:
                read(folder)
            message = str(error.value)
            assert said in message, (change, message)
            assert "\n" not in message, change
            assert len(message) < 1000, change


class Code:
    """What a pickle may run when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was-run"),)


def test_pickled_weights_that_are_damaged_or_hold_code_are_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("code", "garbage", "empty", "cut"):
        shutil.copytree(good, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        torch.save({"x": Code()} if name == "code" else {"x": torch.zeros(99)}, tmp_path / name / "pytorch_model.bin")
    (tmp_path / "garbage" / "pytorch_model.bin").write_bytes(b"garbage")
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"")
    whole = (tmp_path / "cut" / "pytorch_model.bin").read_bytes()
    (tmp_path / "cut" / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    for name in ("code", "garbage", "empty", "cut"):
        with pytest.raises(UserError, match="cannot be read") as error:
            load_model(ModelArguments(model_name_or_path=str(tmp_path / name)), torch.float32)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "was-run").exists()


def test_a_folder_with_an_adapter_is_refused(good: Path, tmp_path: Path) -> None:
    for number, content in enumerate(("{", '{"peft_type": "LORA", "base_model_name_or_path": "x"}')):
        shutil.copytree(good, tmp_path / str(number))
        (tmp_path / str(number) / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match="holds a PEFT adapter"):
            require_weights(ModelArguments(model_name_or_path=str(tmp_path / str(number))))


def with_weights(good: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(good, folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_cannot_train_are_refused(good: Path, tmp_path: Path) -> None:
    for name, change, said in (
        ("none", lambda tensors: {}, "holds no tensor"),
        ("double", lambda tensors: {key: value.double() for key, value in tensors.items()}, "is float64, in which"),
    ):
        with pytest.raises(UserError, match=said):
            read(with_weights(good, tmp_path / name, change))
    double = ModelArguments(model_name_or_path=str(tmp_path / "double"), dtype="float32")
    assert dtype_of(double, load_config(double)) is torch.float32
    read(with_weights(good, tmp_path / "more", lambda tensors: {**tensors, "extra.weight": torch.zeros(3)}))


def test_weights_that_are_not_finite_are_refused_by_name(good: Path, tmp_path: Path) -> None:
    for number, (part, value) in enumerate((("q_proj", float("nan")), ("norm", float("inf")), ("lm_head", -torch.inf))):

        def spoil(tensors: dict[str, Tensor], part: str = part, value: float = value) -> dict[str, Tensor]:
            next(tensor for name, tensor in tensors.items() if part in name).view(-1)[3] = value
            return tensors

        folder = with_weights(good, tmp_path / str(number), spoil)
        model = load_model(ModelArguments(model_name_or_path=str(folder)), torch.float32)
        with pytest.raises(UserError, match=rf"{part}.*holds NaN or infinite numbers"):
            refuse_nonfinite("the model", model)
    refuse_nonfinite("the model", load_model(ModelArguments(model_name_or_path=str(good)), torch.float32))
