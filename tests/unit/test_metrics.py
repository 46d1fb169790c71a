"""metrics.jsonl holds whole lines from the first moment on, no step twice, and nothing that JSON does not know."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from piece_ds.runtime import profiling
from piece_ds.runtime.errors import MachineError
from piece_ds.training.metrics import MetricsLog
from piece_ds.training.task import _note_selection


class Run:
    """A trainer's part in it: a state, and tokens."""

    def __init__(self, path: Path) -> None:
        self.state = TrainerState()
        trainer: Any = SimpleNamespace(
            state=self.state,
            take_num_tokens=lambda: torch.tensor(96),
            general=None,
        )
        self.path, self.log = path, MetricsLog(path, trainer)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.tell("on_step_begin")
            self.state.global_step = step
            self.tell("on_step_end")
            self.state.log_history.append({"loss": 1.0 / step, "grad_norm": float("inf"), "step": step})
            self.tell("on_log")

    def tell(self, event: str) -> None:
        arguments: Any = TrainingArguments
        getattr(self.log, event)(arguments, self.state, TrainerControl())

    def lines(self) -> list[dict[str, Any]]:
        text = self.path.read_text()
        assert text.endswith("\n") or not text
        return [
            json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
            for line in text.splitlines()
        ]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "metrics.jsonl")
    made.log.open(None)
    return made


def test_every_line_is_there_when_its_step_ends(run: Run) -> None:
    for step in (1, 2, 3):
        run.steps(step, step)
        assert [row["step"] for row in run.lines()] == list(range(1, step + 1))


def test_a_line_tells_what_its_steps_cost(run: Run) -> None:
    run.steps(1, 1)
    (row,) = run.lines()
    assert row["loss"] == 1.0
    assert "grad_norm" not in row, "infinity is no JSON"
    assert row["tokens_per_second"] == pytest.approx(96 / row["train_seconds"])
    assert row["host_peak_bytes"] > 1e7


def test_a_line_tells_the_cost_of_the_steps_since_the_last_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this clock every reading is one second later, so a step takes one."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    run.steps(1, 2)
    run.tell("on_step_begin")
    run.tell("on_step_end")
    run.steps(4, 4)
    assert [row["train_seconds"] for row in run.lines()] == [1, 1, 2]
    assert [row["tokens_per_second"] for row in run.lines()] == [96, 96, 48]
    assert run.log.train_seconds == 4


def test_a_line_tells_of_general_text_beside_the_task(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 tokens of the task and 24 of general text, in one second."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    run.tell("on_step_begin")
    run.tell("on_step_end")
    run.state.log_history.append({"loss": 1.0, "step": 1, "general_tokens": 24})
    run.tell("on_log")
    (row,) = run.lines()
    assert (row["tokens"], row["tokens_per_second"], row["general_tokens_per_second"]) == (96, 120, 24)
    run.state.log_history.append({"train_runtime": 1.0, "step": 1})  # no steps: no cost
    run.tell("on_log")
    assert "tokens" not in run.lines()[1]


def test_selection_and_its_statistics_share_the_seconds_of_both(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(profiling._seconds, "statistics", 3.0)
    mask: Any = SimpleNamespace(select_seconds=5.0, mask=SimpleNamespace(num_selected=7, proposed_ratio=0.5))
    _note_selection(mask, run.log)
    row = {"num_selected": 7, "proposed_ratio": 0.5, "statistics_seconds": 3.0, "selection_seconds": 2.0}
    assert run.lines() == [{"event": "selection", "step": 0, **row}]
    mask.select_seconds = None  # it came from a file
    _note_selection(mask, run.log)
    assert len(run.lines()) == 1


def test_what_comes_after_the_last_step_is_told_again_if_the_task_is_finished_again(run: Run) -> None:
    """The checkpoint may be of the last step: its line and what came before stay."""
    before = ("evaluation before", "selection", "checkpoint")
    after = ("training", "saving", "evaluation after")
    run.steps(1, 2)
    for event in (*before, *after):
        run.log.note(event, seconds=1.0)
    run.state.log_history.append({"train_runtime": 3.0, "step": 2})
    run.tell("on_log")
    again = Run(run.path)
    again.log.open(2)
    assert [row.get("event") for row in again.lines()] == [None, None, *before]


def test_what_comes_after_the_checkpoint_is_told_once(run: Run) -> None:
    run.log.note("selection", num_selected=3)
    run.steps(1, 4)
    run.log.note("nonfinite")
    run.log.note("training", seconds=1.0)
    with open(run.path, "a") as file:
        file.write('{"loss": 0.1, "st')  # killed within a line
    again = Run(run.path)
    again.state.global_step = 2
    again.log.open(2)
    again.steps(3, 5)
    assert [(row["step"], row.get("event")) for row in again.lines()] == [
        (0, "selection"),
        (1, None),
        (2, None),
        (3, None),
        (4, None),
        (5, None),
    ]


def test_events_before_an_interruption_count(run: Run) -> None:
    run.steps(1, 1)
    run.log.note("nonfinite")
    run.steps(2, 2)
    again = Run(run.path)
    again.log.open(1)
    again.state.global_step = 2
    again.log.note("nonfinite")
    again.log.note("nonfinite")  # the same step: told again, not twice
    assert again.log.count("nonfinite") == 2
    assert sum(row.get("event") == "nonfinite" for row in again.lines()) == 2


def test_without_resuming_the_file_begins_anew(run: Run) -> None:
    run.steps(1, 2)
    again = Run(run.path)
    again.log.open(None)
    assert again.lines() == []


def test_a_disk_that_fails_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(MachineError, match="No space left"):
        run.log.note("training")


def test_speed_of_training_counts_all_tokens_also_those_after_the_last_log(run: Run) -> None:
    """96 each time they are taken: at three logs and at the end."""
    run.steps(1, 3)
    run.log.train_seconds = 2.0
    assert run.log.tokens_per_second() == (4 * 96 / 2.0, None)
    run.log._trainer.general = SimpleNamespace(num_tokens=16, take_row=dict)
    assert run.log.tokens_per_second() == ((5 * 96 + 16) / 2.0, 16 / 2.0)
    untrained = Run(run.path.with_name("none"))
    assert untrained.log.tokens_per_second() == (None, None)
