"""What each task of a run is given, and the model that it starts from: every field, from where it stands."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support.fakes import faked

from piece_ds.data.image_collate import ImageCollator
from piece_ds.methods.registry import METHODS
from piece_ds.runtime.errors import UserError
from piece_ds.training import run
from piece_ds.training import stream as stream_module
from piece_ds.training.best_step import LOSS_WITHIN_BUDGET
from piece_ds.training.run_folder import RunFolder

TASKS = ("first", "second", "third")


def task_of(number: int, validated: bool = False) -> Any:
    parts = {name: f"{name} of {number}" for name in ("train", "eval", "test")}
    return SimpleNamespace(
        name=TASKS[number],
        validation="rows" if validated else None,
        on_validation=lambda: f"task {number} on its validation rows",
        **parts,
    )


def stream_of(folder: Path, validated: bool = False, **more: Any) -> Any:
    """A stream whose every field is another object."""
    method = SimpleNamespace(
        config=mock.Mock(return_value=SimpleNamespace(method="piece-s")),
        forgetting_budget=0.25,
        importance_batch_size=11,
        mask_file=None,
    )
    settings = SimpleNamespace(
        method=method,
        model=SimpleNamespace(
            model_name_or_path="base", exclude="a,b", eligible="c,d", loss_chunk_tokens=0, sequence_parallel_size=1
        ),
        output=SimpleNamespace(save_full="save all", save_model="every", overwrite_output_dir=False),
        evaluation=SimpleNamespace(kl_tokens=512, load_best_model_at_end="best"),
        data=SimpleNamespace(packing="packed or not", pack_tokens=77),
        training_arguments=mock.Mock(),
    )
    given = {
        "settings": settings,
        "tokenizer": mock.sentinel.tokenizer,
        "tasks": [task_of(number, validated) for number in range(len(TASKS))],
        "scorers": {name: f"scorer of {name}" for name in TASKS},
        "general": ["general rows"],
        "dtype": mock.sentinel.dtype,
        "claim": SimpleNamespace(folder=RunFolder(folder)),
        "eval_batch_size": 13,
        "seed": 100,
        "reporters": mock.sentinel.reporters,
        "general_importance": mock.sentinel.general_importance,
        "judged": mock.sentinel.judged,
    }
    return run.Stream(**{**given, **more})


def fields_of(found: Any) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}


# What a task is given.


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("method", ["piece-s", next(m.name for m in METHODS.values() if m.needs_earlier_tasks)])
def test_a_mask_comes_from_the_methods_flags(
    method: str, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, run, "general_for", "mask_files")
    stream = stream_of(tmp_path)
    config = stream.settings.method.config
    config.return_value = SimpleNamespace(method=method)
    needs = METHODS[method].needs_earlier_tasks
    assert fields_of(run.mask_source_of(stream, index)) == {
        "config": config.return_value,
        "files": stream.settings.method,
        "task": TASKS[index],
        "earlier": fakes.mask_files.return_value if needs else (),
        "general": fakes.general_for.return_value,
        "is_first": index == 0,
    }
    config.assert_called_once_with(100, "a,b", "save all")
    fakes.general_for.assert_called_once_with(stream, index)
    assert fakes.mask_files.mock_calls == [mock.call(stream, index)] * needs


@pytest.mark.parametrize("validated", [False, True])
def test_rows_that_judge_a_task_do_not_choose_its_scale(validated: bool, tmp_path: Path) -> None:
    stream = stream_of(tmp_path, validated=validated)
    assert fields_of(run.budget_for(stream, 1)) == {
        "nats": 0.25,
        "tokenizer": stream.tokenizer,
        "judged": stream.judged,
        "validated": "eval of 1" if validated else None,
        "batch_size": 13,
    }
    stream.settings.method.forgetting_budget = None
    assert run.budget_for(stream, 1) is None
    stream.settings.method.forgetting_budget = 0.0  # nothing may be forgotten: a budget all the same
    assert run.budget_for(stream, 1) is not None


@pytest.mark.parametrize("index", [0, 2])
def test_general_text_serves_importance_and_loss(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = faked(monkeypatch, run, "general_statistics_of", "general_loss_of", "make_collator")
    stream = stream_of(tmp_path)
    flags, rows, collate = stream.settings.method, stream.general_importance, fakes.make_collator.return_value
    assert run.general_for(stream, index) is fakes.general_statistics_of.return_value
    fakes.general_statistics_of.assert_called_once_with(
        flags, rows, collate, tmp_path / "general_statistics", index == 0
    )
    assert run.general_loss_for(stream, index) is fakes.general_loss_of.return_value
    fakes.general_loss_of.assert_called_once_with(
        flags, rows, collate, seed=100 + index, folder=tmp_path, is_base=index == 0
    )
    assert fakes.make_collator.mock_calls == [mock.call(stream.tokenizer)] * 2


@pytest.mark.parametrize(
    ("has_images", "chunk", "tokens"), [(False, 0, 512), (True, 0, 0), (False, 1, 0), (True, 2048, 0)]
)
@pytest.mark.parametrize("general", [None, ["general rows"]])
def test_divergence_is_that_of_every_text_whose_logits_are_held(
    general: Any, has_images: bool, chunk: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, run, "make_collator")
    fakes.make_collator.return_value = mock.Mock(spec=ImageCollator) if has_images else mock.Mock()
    stream = stream_of(tmp_path, general=general)
    stream.settings.model.loss_chunk_tokens = chunk
    rows = {name: f"test of {number}" for number, name in enumerate(TASKS)}
    found = run.divergence_of(stream)
    assert fields_of(found) == {
        "rows": rows if general is None else {"general text": general, **rows},
        "collate": fakes.make_collator.return_value,
        "batch_size": 13,
        "num_tokens": tokens,
        "folder": tmp_path,
    }
    assert list(found.rows)[-3:] == list(TASKS)


@pytest.mark.parametrize("index", [0, 2])
def test_a_baseline_sees_its_task_and_those_before(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = faked(monkeypatch, run, "training_collator")
    stream = stream_of(tmp_path)
    assert fields_of(run.context_of(stream, index)) == {
        "index": index,
        "num_tasks": 3,
        "task": stream.tasks[index],
        "earlier": tuple(stream.tasks[:index]),
        "folder": tmp_path / f"0{index}-{TASKS[index]}",
        "previous": tmp_path / "01-second" if index else None,
        "collate": fakes.training_collator.return_value,
        "batch_size": 11,
        "seed": 100,
        "pack_tokens": 77,
    }
    fakes.training_collator.assert_called_once_with(stream.tokenizer, "packed or not")


@pytest.mark.parametrize(
    ("rule", "judged", "halved"),
    [
        (None, "judged", False),
        (SimpleNamespace(metric="loss"), "judged", False),
        (SimpleNamespace(metric=LOSS_WITHIN_BUDGET), "judged", True),
        (SimpleNamespace(metric=LOSS_WITHIN_BUDGET), None, False),
    ],
)
def test_validation_is_of_the_tasks_own_rows(
    rule: Any, judged: Any, halved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, run, "rule_of", "searched_half")
    fakes.rule_of.return_value = rule
    stream = stream_of(tmp_path, judged=judged)
    arguments = stream.settings.training_arguments.return_value
    arguments.eval_strategy = "no"
    assert run.validation_of(stream, 1) is None
    arguments.eval_strategy = "steps"
    assert fields_of(run.validation_of(stream, 1)) == {
        "task": "task 1 on its validation rows",
        "tokenizer": stream.tokenizer,
        "settings": stream.settings,
        "scorer": "scorer of second",
        "batch_size": 13,
        "rule": rule,
        "general": fakes.searched_half.return_value if halved else None,
        "loads_best": "best",
    }
    assert stream.settings.training_arguments.mock_calls == [mock.call(output_dir=tmp_path)] * 2
    fakes.rule_of.assert_called_once_with(stream.settings, arguments)
    assert fakes.searched_half.mock_calls == [mock.call(judged)] * halved


def test_masks_are_those_of_the_first_tasks_that_left_one(tmp_path: Path) -> None:
    stream = stream_of(tmp_path)
    masks = [stream.folder.task(number, name) / "mask.safetensors" for number, name in enumerate(TASKS)]
    for number in (0, 2):
        masks[number].parent.mkdir()
        masks[number].touch()
    assert [run.mask_files(stream, number) for number in range(4)] == [[], masks[:1], masks[:1], [masks[0], masks[2]]]
    assert stream.folder == RunFolder(tmp_path)
    assert stream.model_folder(1) == tmp_path / "01-second" / "model"


# The model that a task starts from.


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    names = (
        "verify_manifest", "load_model", "refuse_nonfinite", "freeze_ineligible", "mask_names",
        "install_chunked_loss", "set_seed",
    )  # fmt: skip
    return faked(monkeypatch, stream_module, *names)


def saved(stream: Any, index: int) -> Path:
    folder: Path = stream.model_folder(index)
    folder.mkdir(parents=True)
    (folder / "config.json").touch()
    return folder


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("mask_file", [None, "some-mask"])
def test_a_task_starts_from_the_model_of_the_task_before(
    mask_file: str | None, first: int, tmp_path: Path, fakes: mock.Mock
) -> None:
    stream = stream_of(tmp_path)
    stream.settings.method.mask_file, stream.settings.model.loss_chunk_tokens = mask_file, 64
    source = saved(stream, first - 1) if first else None
    model = fakes.load_model.return_value
    assert stream_module._load(stream, first) is model
    folder = tmp_path / f"0{first - 1}-{TASKS[first - 1]}"
    assert fakes.verify_manifest.mock_calls == [mock.call(folder, inside="model/")] * (first > 0)
    fakes.load_model.assert_called_once_with(stream.settings.model, stream.dtype, source)
    fakes.refuse_nonfinite.assert_called_once_with(f"the model in {source or 'base'}", model)
    fakes.freeze_ineligible.assert_called_once_with(
        model,
        selected=None if mask_file is None else fakes.mask_names.return_value,
        patterns=("c", "d"),
        excluded=("a", "b"),
    )
    assert fakes.mask_names.mock_calls == [mock.call(mask_file)] * (mask_file is not None)
    fakes.install_chunked_loss.assert_called_once_with(model, 64)
    stream.settings.training_arguments.assert_called_once_with(output_dir=tmp_path)
    assert not fakes.set_seed.mock_calls

    # What is damaged is not loaded; what may not train is frozen before anything is added.
    order = [call[0] for call in fakes.mock_calls]
    expected = ["verify_manifest", "load_model", "refuse_nonfinite", "freeze_ineligible", "install_chunked_loss"]
    assert [name for name in order if name in expected] == expected[first == 0 :]


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("saves_itself", [False, True])
def test_a_baseline_adds_what_it_trains_the_same_on_every_rank(
    saves_itself: bool, first: int, tmp_path: Path, fakes: mock.Mock
) -> None:
    baseline = mock.Mock(saves_itself=saves_itself)
    stream = stream_of(tmp_path, baseline=baseline)
    source = saved(stream, first - 1) if first and not saves_itself else None
    assert stream_module._load(stream, first) is baseline.adapt.return_value
    fakes.load_model.assert_called_once_with(stream.settings.model, stream.dtype, source)
    fakes.set_seed.assert_called_once_with(100)
    previous = tmp_path / "01-second" if first else None
    baseline.adapt.assert_called_once_with(fakes.load_model.return_value, 3, previous)
    assert len(fakes.verify_manifest.mock_calls) == (first > 0 and not saves_itself)


def test_a_model_that_was_not_saved_is_said_before_anything_is_loaded(tmp_path: Path, fakes: mock.Mock) -> None:
    stream = stream_of(tmp_path)
    stream.model_folder(0).mkdir(parents=True)  # without its config.json
    with pytest.raises(UserError, match=r"00-first/model is missing: .* cannot be resumed after task 1;"):
        stream_module._load(stream, 1)
    assert not fakes.mock_calls
