"""A recipe's learning rate is in proportion to the model's weights, read from a sample of its files."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.models import make_model
from torch import nn

from piece_ds.config.recommended import MEASURED_SIZE, rate_in_proportion
from piece_ds.config.settings import parse
from piece_ds.models.loading import load_config
from piece_ds.models.weight_size import NUM_ROWS, size_of_files, size_of_model, vocabulary_of
from piece_ds.preflight.inputs import with_rate

WORDS = 100


def write_model(folder: Path, scale: float, num_files: int = 2) -> Path:
    """Write matrices of a known size among parameters that do not count, over several files."""
    generator = torch.Generator().manual_seed(0)
    for number in range(num_files):
        matrices = {f"layers.{number}.{i}.weight": torch.randn(64, 48, generator=generator) * scale for i in range(40)}
        experts = torch.randn(4, 48, 32, generator=generator, dtype=torch.float32) * scale
        others = {
            f"layers.{number}.norm.weight": torch.full((48,), 100.0),
            f"layers.{number}.experts": experts.bfloat16(),
            f"patches.{number}.weight": torch.full((8, 3, 4, 4), 100.0),
            f"convolution.{number}.weight": torch.full((48, 1, 4), 100.0),
            f"gate.{number}.weight": torch.full((1, 48), 100.0),
            f"scale.{number}": torch.full((48, 1), 100.0),
            f"embed.{number}.weight": torch.full((WORDS, 48), 100.0),
            f"packed.{number}.weight": torch.full((64, 48), 100, dtype=torch.uint8),
        }
        save_file(matrices | others, folder / f"model-{number}.safetensors")
    return folder


def test_matrices_count_and_nothing_else(tmp_path: Path) -> None:
    for scale in (0.19, 0.02):
        found = size_of_files(str(write_model(tmp_path, scale)), WORDS)
        assert found == pytest.approx(scale, rel=0.02)


def test_larger_matrices_weigh_more_and_a_sample_is_of_the_middle(tmp_path: Path) -> None:
    edges = torch.zeros(2 * NUM_ROWS, 8)
    edges[NUM_ROWS // 2 : -NUM_ROWS // 2] = 3.0
    save_file({"a.weight": edges, "b.weight": torch.ones(NUM_ROWS, 4)}, tmp_path / "model.safetensors")
    want = ((9 * edges.numel() + 1 * 4 * NUM_ROWS) / (edges.numel() + 4 * NUM_ROWS)) ** 0.5
    assert size_of_files(str(tmp_path), None) == pytest.approx(want)


def test_files_that_say_nothing_give_none(tmp_path: Path) -> None:
    assert size_of_files(str(tmp_path), None) is None
    assert size_of_files("nobody/nothing-here", None) is None
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    assert size_of_files(str(tmp_path), None) is None
    save_file({"norm.weight": torch.ones(4), "zero.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    assert size_of_files(str(tmp_path), None) is None


def test_a_model_in_memory_has_the_size_of_its_files(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    words = vocabulary_of(model)
    assert words == model.config.vocab_size == vocabulary_of(model.config)
    assert size_of_model(model, words) == pytest.approx(size_of_files(str(tmp_path), words) or 0.0)
    assert vocabulary_of(nn.Linear(2, 2)) is None
    assert size_of_model(nn.Linear(4, 4).to(torch.float16), None) is not None


@pytest.mark.parametrize("recipe", ["mask", "full"])
def test_a_recipes_rate_follows_the_weights_and_a_users_rate_does_not(
    tmp_path: Path, recipe: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")
    for values in model.parameters():
        values.data.normal_(0, MEASURED_SIZE / 10)
    model.save_pretrained(tmp_path)
    argv = ["--recipe", recipe, "--model_name_or_path", str(tmp_path), "--output_dir", "out"]
    settings = parse(argv)
    config, rate = load_config(settings.model), settings.recipe_rate
    assert rate is not None
    with caplog.at_level(logging.WARNING):
        found = with_rate(settings, config).training_arguments().learning_rate
    assert found == pytest.approx(rate / 10, rel=0.1)
    assert f"--learning_rate {found:g}: {rate:g} of --recipe {recipe}, in proportion" in caplog.text

    # What the user sets wins: on the command line, in YAML, and as a comparison's override.
    (tmp_path / "run.yaml").write_text("learning_rate: 0.5\n", encoding="utf-8")
    given = (parse([*argv, "--learning_rate", "0.5"]), parse([*argv, "--config", str(tmp_path / "run.yaml")]))
    for other in (*given, settings.rebuilt({}, {"learning_rate": 0.5})):
        assert with_rate(other, config).training_arguments().learning_rate == 0.5
    # Without a recipe's rate nothing is read.
    for plain in (parse(argv[2:]), parse(["--recipe", "paper", *argv[2:]])):
        assert plain.recipe_rate is None
        assert with_rate(plain, config) is plain


def test_weights_that_cannot_be_read_keep_the_rate_and_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    settings = parse(["--recipe", "mask", "--model_name_or_path", str(tmp_path), "--output_dir", "out"])
    with caplog.at_level(logging.WARNING):
        found = with_rate(settings, model.config)
    assert found.training_arguments().learning_rate == settings.recipe_rate
    assert "if they are smaller, give a smaller rate" in caplog.text


def test_rates_have_two_digits_and_are_the_measured_ones_on_the_measured_model() -> None:
    assert rate_in_proportion(1e-3, MEASURED_SIZE) == 1e-3
    assert rate_in_proportion(1e-3, 0.1924757) == 1e-3
    assert rate_in_proportion(1e-3, 0.0350712) == 1.8e-4
    assert rate_in_proportion(1e-4, 0.02) == 1e-5
