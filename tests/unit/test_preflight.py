"""preflight(): each check of a job gets what it checks, and what a job does not need is not checked."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support.fakes import faked

from piece_ds.preflight import preflight as module
from piece_ds.preflight.inputs import Inputs
from piece_ds.preflight.preflight import EVALUATE, SELECT, TRAIN, preflight

CALLED = (
    "find_method", "_check_flags", "check_loss_chunks", "check_places", "load_inputs", "check_sources",
    "check_trainer_arguments", "check_accelerate_variables", "_check_model_options", "check_training",
    "check_sequences", "_num_rows", "check_accumulation", "check_own_evaluation", "check_best_step", "_num_steps",
    "check_optimizer", "check_offload", "check_kernels", "require_rank_consistency", "_claim_of", "check_overwrite",
    "open_reporters",
)  # fmt: skip
OF_EVERY_JOB = {"find_method", "_check_flags", "check_loss_chunks", "check_places", "load_inputs"}
OF_EVERY_JOB |= {"check_trainer_arguments", "check_accelerate_variables", "require_rank_consistency"}


def settings_of(scale: str = "none", keeps: bool = False, patience: int | None = None, accumulation: str = "") -> Any:
    return SimpleNamespace(
        method=SimpleNamespace(method="piece-f", step_scale=scale),
        evaluation=SimpleNamespace(load_best_model_at_end=keeps, early_stopping_patience=patience),
        output=SimpleNamespace(incomplete_accumulation=accumulation),
        baseline=mock.sentinel.baseline_settings,
        given=mock.sentinel.given,
    )


def prepared(
    patch: pytest.MonkeyPatch, checked: Any, has_mask: bool = True, baseline: Any = None, real: tuple[str, ...] = ()
) -> mock.Mock:
    fakes = faked(patch, module, *(name for name in CALLED if name not in real))
    fakes.find_method.return_value = SimpleNamespace(name="piece-f", has_mask=has_mask, baseline=baseline)
    values: dict[str, Any] = {field.name: getattr(mock.sentinel, field.name) for field in fields(Inputs)}
    values["settings"], values["arguments"] = checked, SimpleNamespace(report_to=["wandb"])
    values["tasks"] = [SimpleNamespace(name=name, eval=[0] * n) for n, name in enumerate("ab", 3)]
    fakes.load_inputs.return_value = Inputs(**{**values, "baseline": None, "claim": None, "reporters": None})
    fakes._num_rows.return_value = {"a": 7, "b": 8}
    fakes._num_steps.side_effect = lambda arguments, rows: 100 * rows
    fakes._claim_of.return_value.folder.root = Path("out")
    return fakes


@pytest.mark.parametrize(
    ("checked", "has_mask", "masked", "keeps_best", "smaller"),
    [
        (settings_of(), True, True, False, False),
        (settings_of(), False, False, False, False),
        (settings_of(scale="general"), False, True, False, False),
        (settings_of(keeps=True), True, True, True, False),
        (settings_of(patience=0), True, True, True, False),
        (settings_of(accumulation="smaller_step"), True, True, False, True),
    ],
)
def test_training_is_checked_as_the_files_and_flags_say(
    checked: Any, has_mask: bool, masked: bool, keeps_best: bool, smaller: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline = None if has_mask else mock.Mock(return_value=mock.sentinel.made)
    fakes, given = prepared(monkeypatch, checked, has_mask, baseline), settings_of()
    found = preflight(given)
    method, read = fakes.find_method.return_value, fakes.load_inputs.return_value
    arguments, tasks, claim = read.arguments, read.tasks, fakes._claim_of.return_value
    expected: dict[str, list[tuple[Any, ...]]] = {
        "find_method": [("piece-f",)],
        "_check_flags": [(given, TRAIN, method)],
        "check_loss_chunks": [(given,)],
        "check_places": [(given,)],
        "load_inputs": [(given,)],
        "check_sources": [(checked, 2)],
        "check_trainer_arguments": [(arguments, checked.given, keeps_best)],
        "check_accelerate_variables": [(arguments,)],
        "_check_model_options": [(read,)],
        "check_training": [(arguments, masked)],
        "check_sequences": [(checked, arguments, read.config, tasks, method)],
        "check_accumulation": [("a", 7, arguments, smaller), ("b", 8, arguments, smaller)],
        "check_own_evaluation": [(arguments, {"a": 7, "b": 8}, {"a": 3, "b": 4})],
        "check_best_step": [(checked, arguments, tasks, read.scorers)],
        "_num_steps": [(arguments, 7), (arguments, 8)],
        "check_optimizer": [(arguments, read.config, [700, 800], masked)],
        "check_offload": [("piece-f", arguments)],
        "check_kernels": [("piece-f", arguments)],
        "check_overwrite": [(checked, Path("out"))],
        "open_reporters": [(["wandb"], Path("out"))],
    }
    for name, calls in expected.items():
        assert getattr(fakes, name).mock_calls == [mock.call(*arguments) for arguments in calls], name

    # A method without a mask is made of its own settings, and what counts rows or claims the folder knows it.
    made = None if has_mask else mock.sentinel.made
    if baseline is not None:
        baseline.assert_called_once_with(mock.sentinel.baseline_settings)
    for name in ("_num_rows", "require_rank_consistency", "_claim_of"):
        (call,) = [call for call in fakes.mock_calls if call[0] == name]
        assert call.args[0].baseline is made
    claim.check.assert_called_once_with()
    assert (found.claim, found.reporters) == (claim, fakes.open_reporters.return_value)
    assert found.baseline is made

    # The folder is looked at last, when all else is known to be good.
    order = [call[0] for call in fakes.mock_calls if call[0] in CALLED or call[0] == "_claim_of().check"]
    assert order[-4:] == ["_claim_of", "check_overwrite", "_claim_of().check", "open_reporters"]


@pytest.mark.parametrize(
    ("more", "rows", "expected"),
    [
        # 2 ranks of 2 rows make 4 rows a round, 3 rounds a step, 2.5 epochs.
        ({}, (24, 25), [5, 8]),
        ({}, (1, 12), [3, 3]),
        ({"gradient_accumulation_steps": 1}, (4, 5), [3, 5]),
        ({"num_train_epochs": 1.0}, (24, 36), [2, 3]),
        ({"max_steps": 1}, (24, 25), [1, 1]),
        ({"max_steps": 9}, (1, 2), [9, 9]),
    ],
)
@pytest.mark.parametrize("counts", ["rows", "packs", "baseline"])
def test_steps_are_those_of_the_rows_or_packs_that_a_task_trains_on(
    counts: str, more: dict[str, Any], rows: tuple[int, int], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline, checked = mock.Mock(), settings_of()
    checked.data = SimpleNamespace(pack_tokens=77 if counts == "packs" else None)
    fakes = prepared(monkeypatch, checked, False, baseline if counts != "rows" else None, ("_num_rows", "_num_steps"))
    size, packing = (
        faked(monkeypatch, module, "world_size").world_size,
        faked(monkeypatch, module, "pack_rows", "packs_per_step"),
    )
    size.return_value = 2
    arguments = fakes.load_inputs.return_value.arguments
    vars(arguments).update(
        per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=2.5, max_steps=-1
    )
    vars(arguments).update(more)
    tasks = fakes.load_inputs.return_value.tasks
    for task, count in zip(tasks, rows, strict=True):
        task.train = [0] * (count if counts == "rows" else 1000)
    packing.pack_rows.side_effect = [[0] * count for count in rows]
    baseline.return_value.num_rows.side_effect = list(rows)

    preflight(settings_of())
    assert [call.args[1] for call in fakes.check_accumulation.mock_calls] == list(rows)
    assert fakes.check_own_evaluation.mock_calls[0].args[1] == dict(zip("ab", rows, strict=True))
    assert fakes.check_optimizer.mock_calls[0].args[2] == expected

    # Packs are made as training makes them; a baseline knows the tasks before, whose rows it may replay.
    multiple = packing.packs_per_step.return_value
    packed = [mock.call(task.name, task.train, 77, multiple) for task in tasks]
    assert packing.pack_rows.mock_calls == (packed if counts == "packs" else [])
    assert packing.packs_per_step.mock_calls == ([mock.call(arguments)] if counts == "packs" else [])
    counted = [mock.call(tasks[0], []), mock.call(tasks[1], [tasks[0]])]
    assert baseline.return_value.num_rows.mock_calls == (counted if counts == "baseline" else [])


def test_options_that_need_something_of_the_model_are_checked_against_its_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checked = settings_of()
    checked.model = SimpleNamespace(trust_remote_code=mock.sentinel.trusted)
    fakes = prepared(monkeypatch, checked, real=("_check_model_options",))
    names = ("check_activation_checkpointing", "check_label_smoothing", "check_lengths", "empty_model")
    checks = faked(monkeypatch, module, *names)
    preflight(settings_of())
    read = fakes.load_inputs.return_value
    make_model = checks.check_activation_checkpointing.call_args.args[1]
    assert checks.mock_calls == [
        mock.call.check_activation_checkpointing(read.arguments, make_model),
        mock.call.check_label_smoothing(checked, read.arguments, make_model),
        mock.call.check_lengths(read.arguments, read.tasks, read.tokenizer),
    ]
    assert make_model() is checks.empty_model.return_value  # made only where a check asks
    checks.empty_model.assert_called_once_with(read.config, mock.sentinel.trusted)


@pytest.mark.parametrize(
    ("job", "more"), [(SELECT, {"check_sources", "check_kernels"}), (EVALUATE, set())], ids=[SELECT, EVALUATE]
)
def test_other_jobs_are_not_asked_for_what_training_needs(
    job: str, more: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes, given = prepared(monkeypatch, settings_of()), settings_of()
    found = preflight(given, job)
    assert found is fakes.load_inputs.return_value
    assert {call[0] for call in fakes.mock_calls} == OF_EVERY_JOB | more
    fakes._check_flags.assert_called_once_with(given, job, fakes.find_method.return_value)


# What a run's folder is claimed with.


@pytest.mark.parametrize(("stage", "baseline"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("decides", [False, True])
def test_the_claim_compares_what_decides_the_results_and_writes_down_the_rest(
    decides: bool, stage: int, baseline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, module, "decides_weights", "resumes_from", "world_size")
    fakes.decides_weights.return_value, fakes.world_size.return_value = decides, 3
    names = (*module.DECISIVE, *module.OF_BEST_STEP)
    arguments: Any = SimpleNamespace(
        **{name: SimpleNamespace(value=f"the {name}") if n % 2 else n for n, name in enumerate(names)},
        output_dir=str(tmp_path / "out"),
        gradient_accumulation_steps=5,
        hf_deepspeed_config=SimpleNamespace(
            config="the DeepSpeed configuration", get_value={"zero_optimization.stage": stage}.get
        ),
        to_dict=lambda: {"every": "argument"},
    )
    settings: Any = SimpleNamespace(
        resolved=lambda: {"MethodArguments": {"method": "piece-s"}},
        output=SimpleNamespace(overwrite_output_dir=mock.sentinel.overwrite),
    )
    given: Any = SimpleNamespace(
        settings=settings, arguments=arguments, baseline=mock.Mock(spec=module.Baseline) if baseline else None
    )
    claim = module._claim_of(given)
    compared = names if decides else module.DECISIVE
    decisive = {name: f"the {name}" if n % 2 else n for n, name in enumerate(names) if name in compared}
    sharding = {"world_size": 3, "zero_stage": stage}
    assert claim.configuration == {
        "MethodArguments": {"method": "piece-s"},
        "TrainingArguments": {**decisive, "gradient_accumulation_steps * ranks": 15},
        **(sharding if baseline else {}),  # a masked run resumes on any number of ranks
    }
    assert claim.also == {
        "all_training_arguments": {"every": "argument"},
        "deepspeed": "the DeepSpeed configuration",
        **sharding,
    }
    assert claim.folder.root == tmp_path / "out"
    assert (claim.resume, claim.overwrite) == (fakes.resumes_from.return_value, mock.sentinel.overwrite)
    assert not (tmp_path / "out").exists()
    fakes.decides_weights.assert_called_once_with(settings, arguments)
    fakes.resumes_from.assert_called_once_with(arguments)
