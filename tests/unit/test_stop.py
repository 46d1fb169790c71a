"""A signal is noted whenever it comes, and heeded at the next point that all ranks pass."""

import os
import signal

import pytest
import torch
from torch import Tensor

from piece_ds.runtime import signals as stop


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
