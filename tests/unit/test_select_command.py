"""`piece_ds select`: what the settings say reaches the model, the statistics and the mask file, each in its place."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset
from support.fakes import faked

from piece_ds.cli import select
from piece_ds.config.settings import Settings, parse
from piece_ds.demo.model import make_tokenizer
from piece_ds.preflight.preflight import SELECT

FAKED = (
    "preflight", "load_model", "freeze_ineligible", "install_chunked_loss", "statistics_engine", "reads_images",
    "check_rows", "make_collator", "general_statistics_of", "MaskSource", "training_collator", "layout_of", "with_base",
    "save_mask",
)  # fmt: skip
FLAGS = ["--model_name_or_path", "m", "--eligible", "*q_proj*,*up*", "--exclude", "*bias", "--loss_chunk_tokens", "64"]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """In the place of all that reads, trains or writes; they take no arguments but those that the real ones take."""
    order = faked(monkeypatch, select, *FAKED)
    order.reads_images.return_value = False
    return order


def run(fakes: mock.Mock, folder: Path, *flags: str, checkpoints: bool = False) -> tuple[Settings, SimpleNamespace]:
    settings, rows = parse([*FLAGS, *flags]), Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]})
    checkpointing: dict[str, Any] = {
        "gradient_checkpointing": checkpoints,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    inputs = SimpleNamespace(
        settings=settings,
        arguments=SimpleNamespace(seed=5, **checkpointing),
        tasks=[SimpleNamespace(name="first", train=rows), SimpleNamespace(name="second", train=None)],
        output_file=folder / "mask",
        tokenizer=make_tokenizer(64),
        config="config",
        dtype=torch.bfloat16,
        general_importance="general rows",
    )
    fakes.preflight.return_value = inputs
    assert select.select_mask(settings) is fakes.with_base.return_value
    fakes.preflight.assert_called_once_with(settings, SELECT)
    return settings, inputs


def test_the_model_is_prepared_as_the_flags_say(fakes: mock.Mock, tmp_path: Path) -> None:
    settings, inputs = run(fakes, tmp_path, "--importance_batch_size", "1")
    model, engine = fakes.load_model.return_value, fakes.statistics_engine.return_value
    fakes.load_model.assert_called_once_with(settings.model, torch.bfloat16)
    fakes.freeze_ineligible.assert_called_once_with(model, patterns=("*q_proj*", "*up*"), excluded=("*bias",))
    fakes.install_chunked_loss.assert_called_once_with(model, 64)
    fakes.statistics_engine.assert_called_once_with(model, inputs.arguments)
    model.gradient_checkpointing_enable.assert_not_called()
    (call,) = fakes.check_rows.mock_calls
    assert (call.args[0], list(call.args[1]), *call.args[2:]) == (engine, [6, 7], inputs.tokenizer.pad_token_id, True)
    engine.empty_partition_cache.assert_called_once_with()
    engine.destroy.assert_called_once_with()


def test_the_mask_is_of_the_first_tasks_statistics_and_names_its_base(fakes: mock.Mock, tmp_path: Path) -> None:
    settings, inputs = run(fakes, tmp_path, "--importance_batch_size", "3", "--method", "piece-f", checkpoints=True)
    engine, source = fakes.statistics_engine.return_value, fakes.MaskSource.return_value
    fakes.load_model.return_value.gradient_checkpointing_enable.assert_called_once_with({"use_reentrant": False})
    assert fakes.check_rows.mock_calls[0].args[3] is False
    fakes.make_collator.assert_called_once_with(inputs.tokenizer)
    fakes.training_collator.assert_called_once_with(inputs.tokenizer, False)
    folder = Path(f"{inputs.output_file}.general_statistics")
    fakes.general_statistics_of.assert_called_once_with(
        settings.method, "general rows", fakes.make_collator.return_value, folder, True
    )
    config = settings.method.config(5, "*bias")
    assert (config.method, config.seed, config.exclude) == ("piece-f", 5, ("*bias",))
    fakes.MaskSource.assert_called_once_with(
        config=config, files=settings.method, task="first", general=fakes.general_statistics_of.return_value
    )
    source.batches.assert_called_once_with(inputs.tasks[0].train, fakes.training_collator.return_value)
    fakes.layout_of.assert_called_once_with(engine.module)
    source.estimate.assert_called_once_with(engine, source.batches.return_value, fakes.layout_of.return_value)
    fakes.with_base.assert_called_once_with(source.estimate.return_value, engine.module)
    fakes.save_mask.assert_called_once_with(tmp_path / "mask", fakes.with_base.return_value)


def test_rows_that_lie_side_by_side_and_pictures_are_not_tried_with_padding(fakes: mock.Mock, tmp_path: Path) -> None:
    run(fakes, tmp_path, "--packing")
    assert fakes.training_collator.mock_calls[0].args[1] is True
    fakes.reads_images.return_value = True
    fakes.preflight.reset_mock()
    run(fakes, tmp_path)
    fakes.reads_images.assert_called_with("config")
    fakes.check_rows.assert_not_called()


def test_the_command_says_how_much_was_selected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mask = SimpleNamespace(num_selected=3, layout=SimpleNamespace(total=40), method="piece-f", proposed_ratio=0.25)
    asked: list[Settings] = []
    monkeypatch.setattr(select, "select_mask", lambda settings: asked.append(settings) or mask)
    select.main(FLAGS)
    assert [one.model.eligible for one in asked] == ["*q_proj*,*up*"]
    assert capsys.readouterr().out == "3 of 40 elements selected (piece-f); proposed ratio: 25 %\n"
    faked(monkeypatch, select, "methods_help").methods_help.return_value = "words-of-every-method"
    select.main(["--help"])
    assert "words-of-every-method" in capsys.readouterr().out
    assert len(asked) == 1
