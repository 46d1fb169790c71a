"""Reporters of a stream: steps go on from task to task in one run, and the stream's own results are in it."""

import gc
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from piece_ds.config.settings import parse
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.report.results import RunResults
from piece_ds.runtime.errors import UserError
from piece_ds.training.reporters import StreamReporters, newest_values, open_reporters


class Recorder(TrainerCallback):
    """Keeps what it is told, as (event, step, output folder, logs)."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, str, dict[str, float] | None]] = []

    def _keep(self, event: str, args: Any, state: TrainerState, logs: Any = None) -> None:
        self.told.append((event, state.global_step, Path(args.output_dir).name, logs))

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("init", args, state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert args.run_name == "mine"
        self._keep("begin", args, state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._keep("log", args, state, dict(logs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("save", args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep("end", args, state)


def results_after(num_tasks: int) -> RunResults:
    matrix = ResultMatrix(("law", "摘要"), ("accuracy", "loss")).with_before(
        {"law": 0.25}, {"law": 3.0, "摘要": 4.0}, 1.5
    )
    rows = [({"law": 0.75}, {"law": 1.0}, 1.6), ({"law": 0.5}, {"law": 1.5, "摘要": 2.0}, 1.75)]
    for row in rows[:num_tasks]:
        matrix = matrix.with_row(*row)
    cost = {task: {"train_seconds": 2.0, "num_steps": 3, "peak_bytes": None} for task in ("law", "摘要")[:num_tasks]}
    return RunResults("x", "piece-s", 0.1, matrix, cost=cost)


def train_task(callback: TrainerCallback, folder: str, num_steps: int) -> None:
    """What transformers' Trainer tells its callbacks while it trains."""
    args = SimpleNamespace(output_dir=folder, run_name=None)
    handler = CallbackHandler([callback], None, None, None, None)
    state, control = TrainerState(), TrainerControl()
    handler.on_train_begin(args, state, control)
    for state.global_step in range(1, num_steps + 1):
        handler.on_log(args, state, control, {"loss": 1.0 / state.global_step})
    handler.on_save(args, state, control)
    handler.on_train_end(args, state, control)


def test_two_tasks_are_one_run_whose_steps_never_fall_back() -> None:
    recorder = Recorder()
    reporters = StreamReporters([recorder], Path("out/mine"))
    train_task(reporters.of_task(0), "out/mine/00-law", 3)
    reporters.log_results(results_after(1))
    train_task(reporters.of_task(3), "out/mine/01-摘要", 2)
    reporters.log_results(results_after(2))
    reporters.close()
    assert [(event, step, folder) for event, step, folder, _ in recorder.told] == [
        ("init", 0, "mine"),
        ("begin", 0, "mine"),
        ("log", 1, "mine"),
        ("log", 2, "mine"),
        ("log", 3, "mine"),
        ("save", 3, "00-law"),
        ("log", 3, "mine"),
        ("log", 4, "mine"),
        ("log", 5, "mine"),
        ("save", 2, "01-摘要"),
        ("log", 5, "mine"),
        ("end", 5, "mine"),
    ]
    assert recorder.told[-2][3] == newest_values(results_after(2))


def test_the_task_s_own_state_is_not_touched() -> None:
    reporters = StreamReporters([Recorder()], Path("out/mine"))
    args, state = SimpleNamespace(output_dir="a", run_name=None), TrainerState(global_step=2)
    before = asdict(state)
    reporters.of_task(7).on_train_begin(args, state, TrainerControl())
    assert (asdict(state), args.output_dir, args.run_name) == (before, "a", None)


def test_nothing_is_reported_where_nothing_was_trained() -> None:
    recorder = Recorder()
    reporters = StreamReporters([recorder], Path("out"))
    reporters.log_results(results_after(2))
    reporters.close()
    assert recorder.told == []


def test_values_are_those_of_the_newest_row_and_only_what_was_measured() -> None:
    before, after = newest_values(results_after(0)), newest_values(results_after(2))
    assert before == {
        "eval_tasks/00-law/score": 0.25,
        "eval_tasks/00-law/loss": 3.0,
        "eval_tasks/01-摘要/loss": 4.0,
        "eval_stream/general_loss": 1.5,
    }
    assert (after["eval_tasks/00-law/score"], after["eval_stream/general_loss"]) == (0.5, 1.75)
    assert after["eval_stream/score_backward_transfer"] == -0.25
    assert after["eval_stream/general_loss_change"] == 0.25
    assert after["eval_cost/train_seconds"] == 2.0
    assert "eval_tasks/01-摘要/score" not in after
    assert "eval_cost/peak_bytes" not in after


def test_w_and_b_ends_its_run_with_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reporter leaves the run open; a second stream in the process would be drawn into the first one's."""
    finished: list[bool] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: finished.append(True)))
    for name, expected in (("WandbCallback", [True]), ("OtherCallback", [True])):
        reporters = StreamReporters([type(name, (Recorder,), {})()], Path("out/mine"))
        train_task(reporters.of_task(0), "out/mine/00-law", 1)
        reporters.close()
        assert finished == expected


def test_reporters_that_do_not_exist_or_are_not_installed_are_refused(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--report_to tensorbord: tensorbord is not supported"):
        open_reporters(["tensorbord"], Path("out"))
    # What transformers has half made fails once more when it is deleted.
    hook = sys.unraisablehook
    monkeypatch.setattr("sys.unraisablehook", sys.__unraisablehook__)
    for package, name in (("mlflow", "mlflow"), ("mlflow", "dagshub"), ("neptune", "neptune")):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{package}_available", lambda: False)
        with pytest.raises(UserError, match=f"--report_to {name}: .*[Tt]o install|--report_to {name}: .*installed"):
            open_reporters([name], Path("out"))
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err
    monkeypatch.setattr("sys.unraisablehook", hook)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(UserError, match="TensorBoardCallback requires tensorboard"):
        open_reporters(["tensorboard"], Path("out"))


def test_several_reporters_are_named_with_commas_or_as_a_list_of_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "piece_ds.training.reporters.integration_utils.get_reporting_integration_callbacks",
        lambda names: [Recorder for _ in names],
    )
    config = tmp_path / "run.yaml"
    config.write_text("report_to: [tensorboard, wandb]\n")
    for flags in (["--report_to", "tensorboard,wandb"], ["--config", str(config)]):
        arguments = parse([*flags, "--output_dir", str(tmp_path)]).training_arguments()
        assert len(open_reporters(arguments.report_to, tmp_path)._reporters) == 2


class Failing(TrainerCallback):
    """Fails at one event, as a reporter whose server is gone does."""

    def __init__(self, event: str) -> None:
        setattr(self, event, self._fail)

    def _fail(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto host")


@pytest.mark.parametrize("event", ["on_init_end", "on_train_begin"])
def test_a_reporter_that_cannot_begin_is_one_line(tmp_path: Path, event: str) -> None:
    reporters = StreamReporters([Failing(event)], tmp_path)
    with pytest.raises(UserError, match=r"--report_to failing cannot begin \(ConnectionError: no route to host\)"):
        train_task(reporters.of_task(0), "00-law", 1)


@pytest.mark.parametrize("event", ["on_log", "on_train_end"])
def test_a_reporter_that_fails_later_is_left_out_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, event: str
) -> None:
    recorder = Recorder()
    reporters = StreamReporters([Failing(event), recorder], tmp_path / "mine")
    train_task(reporters.of_task(0), "00-law", 3)
    reporters.close()
    assert [told[0] for told in recorder.told][-1] == "end"
    assert sum("failing has failed, and is told no more" in line for line in caplog.messages) == 1
