"""A run of a stream: what each task is given, what of it reaches the results, and what is removed after it."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support.fakes import faked

from piece_ds.training import stream as module
from piece_ds.training.run_folder import LOGITS_FOLDER, RunFolder

TASKS = ("first", "second", "third")


@dataclass
class Cost:
    train_seconds: float = 7.0


def stream_of(folder: Path, baseline: Any = None, save_model: str = "every", transfer: int = 0, **more: Any) -> Any:
    settings = SimpleNamespace(
        output=SimpleNamespace(save_model=save_model), evaluation=SimpleNamespace(forward_transfer=transfer)
    )
    names = ("tokenizer", "scorers", "general", "dtype", "eval_batch_size")
    return SimpleNamespace(
        **{name: getattr(mock.sentinel, name) for name in names},
        settings=settings,
        tasks=[SimpleNamespace(name=name, train=[0] * 5) for name in TASKS],
        folder=RunFolder(folder),
        model_folder=lambda index: RunFolder(folder).model(index, TASKS[index]),
        baseline=baseline,
        compared_to=None,
        reporters=mock.Mock(),
        claim=mock.MagicMock(),
        **more,
    )


# What trains a task.


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Each step of the results returns what says so, so that a step that is left out or misplaced is seen."""
    names = (
        "mask_source_of", "context_of", "general_for", "general_loss_for", "budget_for", "validation_of",
        "divergence_of", "is_judged_before", "num_steps_before", "_evaluate", "train_task", "layout_of",
        "with_before", "with_task", "with_divergence", "with_forgetting", "with_validation", "with_overlaps",
        "with_changes", "mask_files", "write_results", "_tidy", "written_bytes",
    )  # fmt: skip
    fakes = faked(monkeypatch, module, *names)
    for name in names:
        if name.startswith("with_"):
            getattr(fakes, name).side_effect = lambda results, *_, name=name, **__: f"{results} {name}"
    parameters = [SimpleNamespace(name="a", numel=6), SimpleNamespace(name="b", numel=2)]
    fakes.layout_of.return_value = SimpleNamespace(parameters=parameters)
    fakes.written_bytes.return_value = {"mask_bytes": 11}
    fakes.divergence_of.return_value.of.return_value = {"first": 0.5}
    fakes.train_task.return_value = SimpleNamespace(
        cost=Cost(), index="index", log="log", forgetting="forgetting", validation="validation"
    )
    return fakes


@pytest.mark.parametrize("baseline", [None, "baseline"])
@pytest.mark.parametrize("judged", [False, True])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("save_model", ["every", "last", "never"])
def test_a_task_is_given_what_is_its_own(
    save_model: str, index: int, judged: bool, baseline: Any, tmp_path: Path, fakes: mock.Mock
) -> None:
    stream, model, before, resume = stream_of(tmp_path, baseline, save_model), mock.Mock(), mock.Mock(), mock.Mock()
    fakes.is_judged_before.return_value = judged
    fakes.train_task.side_effect = lambda **given: given["evaluate_after"](mock.Mock()) or fakes.train_task.return_value
    module._run_task(stream, model, index, before, resume)
    given = fakes.train_task.call_args.kwargs
    fakes.train_task.assert_called_once_with(
        model=model,
        tokenizer=stream.tokenizer,
        settings=stream.settings,
        method=baseline or fakes.mask_source_of.return_value,
        context=fakes.context_of.return_value,
        general=fakes.general_for.return_value,
        general_loss=fakes.general_loss_for.return_value,
        budget=fakes.budget_for.return_value,
        validation=fakes.validation_of.return_value,
        claim=stream.claim,
        resume=resume,
        evaluate_before=given["evaluate_before"],
        evaluate_after=given["evaluate_after"],
        save_model_to=None if save_model == "never" else tmp_path / f"0{index}-{TASKS[index]}" / "model",
        reporter=stream.reporters.of_task.return_value,
    )
    assert (given["evaluate_before"] is not None) == (index == 0 and not judged)  # the base model is judged once
    stream.reporters.of_task.assert_called_once_with(fakes.num_steps_before.return_value)
    fakes.num_steps_before.assert_called_once_with(before)
    for name in ("context_of", "general_for", "general_loss_for", "budget_for", "validation_of"):
        getattr(fakes, name).assert_called_once_with(stream, index)
    assert fakes.mask_source_of.mock_calls == [mock.call(stream, index)] * (baseline is None)
    fakes.divergence_of.assert_called_once_with(stream)


@pytest.mark.parametrize(("transfer", "seen"), [(0, 2), (1, 3)])
def test_what_a_task_has_found_is_in_the_results_before_anything_is_removed(
    transfer: int, seen: int, tmp_path: Path, fakes: mock.Mock
) -> None:
    stream, model, engine = stream_of(tmp_path, transfer=transfer), mock.Mock(), mock.Mock()
    fakes.train_task.side_effect = lambda **given: given["evaluate_after"](engine) or fakes.train_task.return_value
    found: Any = module._run_task(stream, model, 1, "results", False)  # type: ignore[arg-type]
    folder = tmp_path / "01-second"
    fakes._evaluate.assert_called_once_with(stream, engine, stream.tasks[:seen], "01-second")
    fakes.divergence_of.return_value.of.assert_called_once_with(engine, list(TASKS[:seen]))
    scores, numel, cost = fakes._evaluate.return_value, {"a": 6, "b": 2}, {"train_seconds": 7.0, "mask_bytes": 11}
    fakes.layout_of.assert_called_once_with(model)
    fakes.written_bytes.assert_called_once_with(folder)
    fakes.mask_files.assert_called_once_with(stream, 2)
    steps = {
        "with_task": mock.call("results", "second", scores, cost=cost, index="index", numel=numel, log="log"),
        "with_divergence": mock.call(mock.ANY, "after second", {"first": 0.5}),
        "with_forgetting": mock.call(mock.ANY, "second", "forgetting"),
        "with_validation": mock.call(mock.ANY, stream.tasks[1], "validation"),
        "with_overlaps": mock.call(mock.ANY, fakes.mask_files.return_value),
        "with_changes": mock.call(mock.ANY, "second", folder / "delta.safetensors"),
    }
    for name, call in steps.items():
        assert getattr(fakes, name).mock_calls == [call]
    assert sorted(found.split()) == sorted(["results", *steps])
    fakes.write_results.assert_called_once_with(found, tmp_path / "results.json")
    stream.reporters.log_results.assert_called_once_with(found)
    fakes._tidy.assert_called_once_with(stream, 1)
    order = [call[0] for call in fakes.mock_calls]
    assert order.index("write_results") < order.index("_tidy")


def test_the_base_model_is_judged_and_written_down_before_the_first_task(tmp_path: Path, fakes: mock.Mock) -> None:
    stream, engine = stream_of(tmp_path), mock.Mock()
    fakes.is_judged_before.return_value = False
    written: list[Any] = []

    def train(**given: Any) -> Any:
        given["evaluate_before"](engine)
        written.append((fakes.write_results.mock_calls[:], stream.reporters.log_results.mock_calls[:]))
        given["evaluate_after"](engine)
        return fakes.train_task.return_value

    fakes.train_task.side_effect = train
    module._run_task(stream, mock.Mock(), 0, "results", False)  # type: ignore[arg-type]
    judged = "results with_before"
    assert written == [([mock.call(judged, tmp_path / "results.json")], [mock.call(judged)])]
    assert fakes._evaluate.mock_calls[0] == mock.call(stream, engine, stream.tasks, "before")
    fakes.with_before.assert_called_once_with("results", fakes._evaluate.return_value)
    assert fakes.divergence_of.return_value.mock_calls[0] == mock.call.begin(engine)
    assert fakes.with_task.call_args.args[0] == judged


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("has_answers", [False, True])
def test_the_base_model_is_not_judged_again_where_another_run_has_judged_it(
    has_answers: bool, main: bool, tmp_path: Path, fakes: mock.Mock, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = faked(monkeypatch, module, "is_main", "barrier", "read_results", "with_before_of")
    more.is_main.return_value, more.with_before_of.return_value = main, "as before"
    stream, engine, other = stream_of(tmp_path / "own"), mock.Mock(), RunFolder(tmp_path / "other")
    stream.compared_to = other
    answers = {"first.jsonl": "what it said"} if has_answers else {}
    for name, text in answers.items():
        other.predictions("before").mkdir(parents=True)
        (other.predictions("before") / name).write_text(text)
    fakes.is_judged_before.return_value = False
    written: list[Any] = []

    def train(**given: Any) -> Any:
        given["evaluate_before"](engine)
        written.append(fakes.write_results.mock_calls[:])
        given["evaluate_after"](engine)
        return fakes.train_task.return_value

    fakes.train_task.side_effect = train
    module._run_task(stream, mock.Mock(), 0, "results", False)  # type: ignore[arg-type]
    more.read_results.assert_called_once_with(other.results_file)
    more.with_before_of.assert_called_once_with("results", more.read_results.return_value)
    assert written == [[mock.call("as before", stream.folder.results_file)]]
    assert fakes._evaluate.mock_calls == [mock.call(stream, engine, stream.tasks[:1], "00-first")]
    assert fakes.divergence_of.return_value.mock_calls[0] == mock.call.begin(engine)
    copied = stream.folder.predictions("before")
    assert {path.name: path.read_text() for path in copied.glob("*")} == (answers if main else {})
    more.barrier.assert_called_once_with()


def test_an_evaluation_is_of_the_tasks_and_moment_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fakes = faked(monkeypatch, module, "evaluate_tasks", "scores_line", "duration")
    fakes.scores_line.return_value, fakes.duration.return_value = "the scores", "the time"
    stream, engine, tasks = stream_of(tmp_path), mock.Mock(), [mock.Mock()]
    found = module._evaluate(stream, engine, tasks, "01-second")
    fakes.evaluate_tasks.assert_called_once_with(
        *(engine, stream.tokenizer, tasks),
        scorers=stream.scorers,
        general=stream.general,
        batch_size=stream.eval_batch_size,
        settings=stream.settings,
        device=engine.device,
        folder=tmp_path / "predictions" / "01-second",
    )
    assert found is fakes.evaluate_tasks.return_value
    fakes.scores_line.assert_called_once_with(found.score, found.loss, found.general_loss)
    fakes.duration.assert_called_once_with(found.seconds)
    assert "evaluation, 01-second: the scores (the time)" in caplog.text


# What is removed.


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("save_model", ["every", "last", "never"])
@pytest.mark.parametrize("baseline", [None, SimpleNamespace(passing=("old", "older"))])
@pytest.mark.parametrize("index", [-1, 0, 1, 2])
def test_only_what_no_later_task_and_no_resumed_run_needs_is_removed(
    index: int, baseline: Any, save_model: str, main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, module, "is_main", "barrier", "forget_resumption")
    fakes.is_main.return_value = main
    folders = [tmp_path / f"0{number}-{name}" for number, name in enumerate(TASKS)]
    there = {folder / name for folder in folders for name in ("old", "older", "model", "other")}
    there.add(tmp_path / LOGITS_FOLDER)
    for path in there:
        path.mkdir(parents=True)
    module._tidy(stream_of(tmp_path, baseline, save_model), index)
    gone = {path for path in there if not path.is_dir()}
    expected: set[Path] = set()
    if main and index > 0:
        expected |= {folders[index - 1] / name for name in ("old", "older")} if baseline else set()
        expected |= {folders[index - 1] / "model"} if save_model == "last" else set()
    if main and index == 2:
        expected |= {tmp_path / LOGITS_FOLDER}
    assert gone == expected
    assert fakes.forget_resumption.mock_calls == [mock.call(folders[index])] * (main and index >= 0)
    fakes.barrier.assert_called_once_with()
    if main and index >= 0:  # a resumed run does it again
        module._tidy(stream_of(tmp_path, baseline, save_model), index)


# The tasks in their order.


@pytest.mark.parametrize(
    "baseline", [None, SimpleNamespace(resumes_inside=False), SimpleNamespace(resumes_inside=True)]
)
@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_stream_goes_on_where_it_ended(
    finished: int, resume: bool, baseline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("open_results", "num_finished", "clear_half_written", "_tidy", "_load", "_run_task", "signal_handling")
    fakes = faked(monkeypatch, module, *names, "report_status")
    fakes.signal_handling.return_value = mock.MagicMock()
    fakes.num_finished.return_value = finished
    fakes._run_task.side_effect = lambda stream, model, index, results, resume: f"after {index}"
    stream = stream_of(tmp_path, baseline)
    stream.claim.resume = resume
    results: Any = module.run_stream(stream)
    opened = fakes.open_results.return_value
    fakes.open_results.assert_called_once_with(
        tmp_path / "results.json", stream.settings, stream.tasks, stream.scorers, resume
    )
    fakes.num_finished.assert_called_once_with(opened)
    assert fakes.clear_half_written.mock_calls == [mock.call(tmp_path)] * resume
    assert fakes._tidy.mock_calls == [mock.call(stream, finished - 1)] * resume
    if finished == 3:
        assert results is opened
        assert not fakes._load.mock_calls
        assert not fakes._run_task.mock_calls
        return
    fakes._load.assert_called_once_with(stream, finished)
    model, inside = fakes._load.return_value, resume and (baseline is None or baseline.resumes_inside)
    before = [opened, *(f"after {index}" for index in range(finished, 2))]
    assert fakes._run_task.mock_calls == [
        mock.call(stream, model, index, before[index - finished], inside and index == finished)
        for index in range(finished, 3)
    ]
    assert results == "after 2"
    stream.reporters.close.assert_called_once_with(model=model, processing_class=stream.tokenizer)
