"""What is refused before a weight is read: methods, DeepSpeed files, masks, optimizers, incomplete accumulation."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.launches import CONFIGS, make_model_folder
from transformers import AutoConfig, AutoModelForCausalLM

from piece_ds.checkpoint.mask_file import save_mask
from piece_ds.config.settings import parse
from piece_ds.methods.registry import METHODS, find_method
from piece_ds.models.layout import layout_of
from piece_ds.preflight import checks
from piece_ds.preflight.checks import (
    check_accumulation,
    check_deepspeed_file,
    check_mask,
    check_sources,
    check_training,
    resumes_from,
)
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask


def training(**values: Any) -> Any:
    defaults = {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "max_steps": -1,
        "optim": "adamw_torch",
        "resume_from_checkpoint": None,
    }
    return SimpleNamespace(**{**defaults, **values})


@pytest.mark.parametrize("method", ["piece-s", "piece-f", "random", "magnitude", "seqft"])
def test_known_methods_pass(method: str) -> None:
    assert find_method(method).name == method


@pytest.mark.parametrize("method", ["piece", "PIECE-S", "", "seq-ft"])
def test_unknown_methods_are_refused(method: str) -> None:
    with pytest.raises(UserError, match=f"--method '{method}' is unknown; known: "):
        find_method(method)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_configurations_of_the_repository_pass_as_file_and_as_text(path: Path) -> None:
    check_deepspeed_file(str(path))
    check_deepspeed_file(path.read_text())


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"zenflow": {"topk_ratio": 0.1}}, r"zero_optimization\.zenflow \{.*\}; remove it"),
        ({"offload_optimizer": {"device": "nvme"}}, r"offload_optimizer\.device \"nvme\"; use 'cpu'"),
        ({"offload_param": {"device": "nvme"}}, r"offload_param\.device \"nvme\"; use 'cpu'"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.3}}, r"offload_optimizer\.ratio 0\.3; remove it"),
        ({"offload_optimizer": {"device": "cpu", "super_offload": True}}, r"super_offload true; remove it"),
        ({"zero_quantized_gradients": True}, r"zero_quantized_gradients true; set it to false"),
        ({"stage": 4}, r"zero_optimization\.stage 4; use stage 0, 1, 2 or 3"),
    ],
)
def test_unproven_features_are_refused_by_their_key(tmp_path: Path, zero: dict[str, Any], message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, **zero}}))
    with pytest.raises(UserError, match=message):
        check_deepspeed_file(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"a": }', r"line 2: not JSON"),
        ("", r"line 1: not JSON"),
        ("[]", r"must hold an object of settings, got list"),
        (b"\xff\xfe\x00", r"cannot be read"),
    ],
)
def test_files_that_are_no_configuration_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        check_deepspeed_file(str(path))


@pytest.mark.parametrize("path", [None, "none.json", "."])
def test_missing_configuration_is_refused(path: str | None) -> None:
    with pytest.raises(UserError, match=r"no such file; ds_configs/ has one for every ZeRO stage"):
        check_deepspeed_file(path)


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "adamw_8bit", "adagrad", "lion_32bit"])
def test_optimizers_that_are_not_proven_are_refused_where_there_is_a_mask(optimizer: str) -> None:
    check_training(training(optim=optimizer), masked=False)
    with pytest.raises(UserError, match=f"--optim {optimizer}: .* use one of adamw_torch, adamw_torch_fused"):
        check_training(training(optim=optimizer), masked=True)


@pytest.mark.parametrize(
    ("given", "resume"),
    [(None, False), ("True", True), ("true", True), (True, True), ("False", False), ("false", False), ("0", False)],
)
def test_resuming_is_yes_or_no(given: Any, resume: bool) -> None:
    assert resumes_from(training(resume_from_checkpoint=given)) is resume


def test_resuming_from_a_named_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match=r"expects True or False, got 'out/checkpoint-2'"):
        resumes_from(training(resume_from_checkpoint="out/checkpoint-2"))


@pytest.mark.parametrize(
    ("num_rows", "num_ranks", "accumulation", "max_steps", "fits"),
    [
        (8, 2, 2, -1, True),
        (7, 2, 2, -1, True),  # four micro-batches on each rank, the last filled up
        (6, 2, 2, -1, False),
        (6, 1, 2, -1, True),
        (6, 1, 4, -1, False),
        (6, 1, 4, 1, True),  # ends before the incomplete one
        (6, 1, 4, 2, False),
        (3, 1, 4, 1, False),
        (5, 1, 1, -1, True),
    ],
)
def test_incomplete_accumulation_is_refused(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_ranks: int, accumulation: int, max_steps: int, fits: bool
) -> None:
    monkeypatch.setattr(checks, "world_size", lambda: num_ranks)
    arguments = training(gradient_accumulation_steps=accumulation, max_steps=max_steps)
    if fits:
        check_accumulation("law", num_rows, arguments, False)
        return
    with pytest.raises(UserError, match=rf"task law: {num_rows} rows .* --incomplete_accumulation smaller_step"):
        check_accumulation("law", num_rows, arguments, False)


def test_incomplete_accumulation_can_be_accepted_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_accumulation("law", 5, training(gradient_accumulation_steps=4), True)
    assert "would accumulate 1 instead of 4" in caplog.text


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and a mask of each."""
    root = tmp_path_factory.mktemp("models")
    for name, hidden_size in {"small": 32, "wide": 48}.items():
        folder = make_model_folder(root / name, hidden_size=hidden_size)
        layout = layout_of(AutoModelForCausalLM.from_pretrained(folder))
        index = {info.name: torch.arange(0, info.numel, 9) for info in layout.parameters[1:5]}
        count = sum(positions.numel() for positions in index.values())
        save_mask(root / f"{name}.safetensors", Mask(layout, index, count, "random", 0.1))
    return root


def settings_with(models: Path, mask: str, *flags: str) -> Any:
    return parse(["--model_name_or_path", str(models / "small"), "--mask_file", str(models / mask), *flags])


def test_mask_of_this_model_passes_without_its_weights(models: Path) -> None:
    check_mask(settings_with(models, "small.safetensors"), AutoConfig.from_pretrained(models / "small"))


def test_every_flipped_bit_of_a_mask_is_noticed(models: Path) -> None:
    content = (models / "small.safetensors").read_bytes()
    config = AutoConfig.from_pretrained(models / "small")
    begin = 8 + int.from_bytes(content[:8], "little")
    damaged = models / "damaged.safetensors"
    for place in range(begin, len(content), 97):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match="damaged"):
            check_mask(settings_with(models, "damaged.safetensors"), config)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_truncated_masks_are_refused(models: Path, kept: int) -> None:
    (models / "cut.safetensors").write_bytes((models / "small.safetensors").read_bytes()[:kept])
    with pytest.raises(UserError, match="truncated or damaged"):
        check_mask(settings_with(models, "cut.safetensors"), AutoConfig.from_pretrained(models / "small"))


@pytest.mark.parametrize(
    ("mask", "flags", "message"),
    [
        ("wide.safetensors", [], r"a mask of another model"),
        ("none.safetensors", [], r"none\.safetensors: no such file"),
        ("small/model.safetensors", [], r"expected 'piece-mask' version '1'"),
        ("small.safetensors", ["--method", "seqft"], r"no meaning with --method seqft"),
    ],
)
def test_masks_that_do_not_fit_are_refused(models: Path, mask: str, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_mask(settings_with(models, mask, *flags), AutoConfig.from_pretrained(models / "small"))


def test_settings_that_a_method_with_a_mask_would_ignore_are_refused_and_no_others() -> None:
    for flag, value, has_meaning in (
        ("--importance_rows", "5", lambda method: method.has_mask),
        ("--exclude", "*norm*", lambda method: not (method.baseline and method.baseline.saves_itself)),
        ("--eligible", "*norm*[:4]", lambda method: method.has_mask),
        ("--budget", "layer", lambda method: not method.has_mask or method.estimator is not None),
        ("--statistics_file", "s", lambda method: not method.has_mask or method.estimator is not None),
    ):
        for name, method in METHODS.items():
            needed = ["--general_text", "self"] if method.needs_general_text else []
            needed += ["--peft_config", "f.json"] if name == "peft" else []
            settings = parse(["--method", name, flag, value, *needed])
            refusal = pytest.raises(UserError, match=f"{flag}.* --method {name}")
            with nullcontext() if has_meaning(method) else refusal:
                check_sources(settings, 2)
    for flag, value in (("--importance_rows", "5"), ("--exclude", "*norm*")):
        with pytest.raises(UserError, match=f"{flag} has no meaning with --mask_file"):
            check_sources(parse([flag, value, "--mask_file", "m.safetensors"]), 1)
    check_sources(parse(["--mask_file", "m.safetensors"]), 1)
