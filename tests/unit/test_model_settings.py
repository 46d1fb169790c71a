"""Settings beside the weights: what would end a run after a whole task is settled or refused before it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.launches import make_model_folder
from transformers import GenerationConfig

from piece_ds.config.arguments import ModelArguments
from piece_ds.models.loading import check_attention_of, load_config, load_model
from piece_ds.models.model_settings import check_generation_settings
from piece_ds.runtime.errors import UserError
from piece_ds.zero import adapter_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0.6}, {"top_p": 0.9, "top_k": 5}, {"do_sample": False, "temperature": 0.1}, {"min_p": 0.1}],
)
def test_sampling_settings_without_sampling_do_not_end_a_save(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **settings}))
    arguments = ModelArguments(model_name_or_path=str(model))
    check_generation_settings(arguments)
    assert "without do_sample" in caplog.text
    load_model(arguments, torch.float32).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 2


def test_sampling_settings_with_sampling_stay(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.5}))
    arguments = ModelArguments(model_name_or_path=str(model))
    check_generation_settings(arguments)
    load_model(arguments, torch.float32).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    kept = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (kept.do_sample, kept.temperature, kept.top_p) == (True, 0.6, 0.5)


@pytest.mark.parametrize("content", ["{", "[1]", "3", '{"max_new_tokens": -1}', '{"early_stopping": "x"}'])
def test_generation_settings_that_cannot_be_used_are_refused(model: Path, content: str) -> None:
    (model / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        check_generation_settings(ModelArguments(model_name_or_path=str(model)))


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "sdpaa", "eagre", "", "é", "a/b"])
def test_attention_that_is_not_there_is_refused_by_its_flag(model: Path, name: str) -> None:
    arguments = ModelArguments(model_name_or_path=str(model), attn_implementation=name)
    config = load_config(arguments)
    if name == "":  # not asked
        check_attention_of(arguments, config)
        return
    with pytest.raises(UserError, match=f"--attn_implementation {name}: .*sdpa and eager"):
        check_attention_of(arguments, config)


def test_attention_that_is_not_for_training_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for name, way_out in (
        ("paged|eager", "use eager"),
        ("paged|sdpa", "use sdpa"),
        ("sdpa_paged", "use sdpa"),
        ("paged|flash_attention_2", "use flash_attention_2"),
        ("flex_attention", "no backward pass on a CPU: use sdpa"),
    ):
        arguments = ModelArguments(model_name_or_path=str(model), attn_implementation=name)
        with pytest.raises(UserError, match=f"--attn_implementation {re.escape(name)} .*{way_out}"):
            check_attention_of(arguments, load_config(arguments))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_that_is_there_passes(model: Path, name: str) -> None:
    arguments = ModelArguments(model_name_or_path=str(model), attn_implementation=name)
    check_attention_of(arguments, load_config(arguments))


def test_what_is_no_engine_is_refused_in_words() -> None:
    inner = type("DeepSpeedEngine", (), {})()
    wrapped = type("DistributedDataParallel", (), {"module": inner})()
    for engine, message in (
        (wrapped, r"a DeepSpeed engine inside DistributedDataParallel.*pass the engine"),
        (torch.nn.Linear(2, 2), r"Linear, which is no DeepSpeed engine"),
        (SimpleNamespace(module=torch.nn.Linear(1, 1)), r"SimpleNamespace, which is no DeepSpeed engine"),
        (None, r"NoneType, which is no DeepSpeed engine"),
    ):
        with pytest.raises(UserError, match=message):
            adapter_for(engine)
