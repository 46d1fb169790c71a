"""A signal is noted whenever it comes, and heeded at the next point that all ranks pass."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from piece_ds.cli.demo import _default_folder
from piece_ds.runtime import signals as stop
from piece_ds.training.stream import _stopped_with_advice


@pytest.mark.parametrize("number", stop.SIGNALS, ids=lambda number: number.name)
def test_a_signal_is_heeded_at_the_next_point(number: signal.Signals) -> None:
    with stop.signal_handling():
        assert not stop.stop_asked()
        os.kill(os.getpid(), number)
        with pytest.raises(stop.Preempted):
            stop.exit_if_signalled("here")


@pytest.mark.parametrize("number", stop.SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_comes_while_ranks_agree_is_heeded_the_next_time(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that waits for the others spends its time there: most signals come then."""
    signals = [number]

    def reduce(noted: Tensor) -> Tensor:
        while signals:
            os.kill(os.getpid(), signals.pop())
        return noted

    monkeypatch.setattr(stop, "world_size", lambda: 2)
    monkeypatch.setattr(stop, "all_reduce_max_", reduce)
    with stop.signal_handling():
        assert not stop.stop_asked()
        assert stop.stop_asked()
        assert stop.stop_asked()


def test_a_signal_that_comes_as_its_handler_does_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    install = signal.signal

    def install_and_send(number: signal.Signals, handler: object) -> object:
        before = install(number, handler)  # type: ignore[arg-type]
        monkeypatch.undo()
        os.kill(os.getpid(), number)
        return before

    monkeypatch.setattr(signal, "signal", install_and_send)
    with stop.signal_handling():
        assert stop.stop_asked()


def test_another_ranks_signal_stops_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "world_size", lambda: 2)
    monkeypatch.setattr(stop, "all_reduce_max_", lambda noted: torch.full_like(noted, int(signal.SIGTERM)))
    with stop.signal_handling(), pytest.raises(stop.Preempted, match="SIGTERM"):
        stop.exit_if_signalled("here")


def test_one_rank_makes_no_tensor_and_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_tensor(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tensor for a number that is known")

    monkeypatch.setattr(stop.torch, "tensor", no_tensor)
    with stop.signal_handling():
        assert not stop.stop_asked()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.stop_asked()


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.signal_handling():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in stop.SIGNALS] == before


def test_an_evaluation_inside_another_does_not_end_the_outer_ones_deferral() -> None:
    with stop.signal_handling():
        os.kill(os.getpid(), signal.SIGUSR1)
        with stop.exits_deferred():
            with stop.exits_deferred():
                stop.exit_if_signalled("in the inner one")
            stop.exit_if_signalled("in the outer one")
        with pytest.raises(stop.Preempted, match="SIGUSR1 after both"):
            stop.exit_if_signalled("after both")


def test_a_stopped_run_says_how_it_is_resumed_if_it_can_be() -> None:
    """With --overwrite_output_dir the flag to resume is refused, and without saved models a later task has no start."""
    for index, save_model, overwrite, saves_itself, words in (
        (0, "last", False, None, "the same command with --resume_from_checkpoint True resumes it"),
        (0, "last", True, None, "with --resume_from_checkpoint True for --overwrite_output_dir resumes it"),
        (0, "never", False, None, "the same command with --resume_from_checkpoint True resumes it"),
        (1, "never", False, None, "cannot be resumed after its first task: begin again in another folder"),
        (1, "never", True, False, "cannot be resumed after its first task: begin again in another folder"),
        (1, "never", False, True, "the same command with --resume_from_checkpoint True resumes it"),
    ):
        output = SimpleNamespace(save_model=save_model, overwrite_output_dir=overwrite)
        baseline = None if saves_itself is None else SimpleNamespace(saves_itself=saves_itself)
        run: Any = SimpleNamespace(settings=SimpleNamespace(output=output), baseline=baseline)
        message = f"^stopped by SIGTERM here; .*{words}$"
        with pytest.raises(stop.Preempted, match=message), _stopped_with_advice(run, index):
            raise stop.Preempted("stopped by SIGTERM here")


def test_the_default_folder_of_a_resumed_run_is_the_one_it_was_stopped_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for there, resume, expected in (
        ([], False, "runs/embedded"),
        ([], True, "runs/embedded"),
        (["embedded"], False, "runs/embedded-2"),
        (["embedded"], True, "runs/embedded"),
        (["embedded", "embedded-2"], True, "runs/embedded-2"),
    ):
        for name in there:
            (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
        assert str(_default_folder(resume)) == expected
