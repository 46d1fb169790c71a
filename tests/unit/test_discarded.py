"""Compact mode throws gradients away where DeepSpeed would, and keeps them where DeepSpeed does."""

from typing import Any

import pytest

from piece_ds.zero.discarded import on_discard


class Optimizer:
    def zero_grad(self, set_to_none: bool = True) -> None:
        self.set_to_none = set_to_none


class Engine:
    """As DeepSpeed's, of two micro-batches a step."""

    def __init__(self, stage: int, micro_steps: int) -> None:
        self.stage, self.micro_steps, self.optimizer, self.calls = stage, micro_steps, Optimizer(), 0

    def zero_grad(self) -> None:
        self.calls += 1

    def zero_optimization(self) -> bool:
        return self.stage > 0

    def gradient_accumulation_steps(self) -> int:
        return 2


@pytest.mark.parametrize(
    ("stage", "micro_steps", "expected"), [(0, 2, 1), (0, 3, 1), (1, 2, 1), (1, 3, 0), (3, 0, 1), (3, 5, 0)]
)
def test_the_engines_discards_where_nothing_lies_elsewhere(stage: int, micro_steps: int, expected: int) -> None:
    engine: Any = Engine(stage, micro_steps)
    discarded: list[int] = []
    undo = on_discard(engine, lambda: discarded.append(1))
    engine.zero_grad()
    assert (len(discarded), engine.calls) == (expected, 1)
    undo()
    engine.zero_grad()
    assert (len(discarded), engine.calls) == (expected, 2)


def test_what_others_had_set_before_is_there_again() -> None:
    engine: Any = Engine(0, 2)
    calls: list[str] = []
    engine.zero_grad = lambda: calls.append("engine")
    engine.optimizer.zero_grad = lambda: calls.append("optimizer")
    undo = on_discard(engine, lambda: calls.append("discarded"))
    engine.zero_grad()
    engine.optimizer.zero_grad()
    assert calls == ["engine", "discarded", "optimizer", "discarded"]
    undo()
    engine.zero_grad()
    engine.optimizer.zero_grad()
    assert calls[4:] == ["engine", "optimizer"]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_optimizers_always_does_and_passes_its_arguments_on(stage: int) -> None:
    engine: Any = Engine(stage, 3)
    discarded: list[int] = []
    undo = on_discard(engine, lambda: discarded.append(1))
    engine.optimizer.zero_grad(set_to_none=False)
    assert (len(discarded), engine.optimizer.set_to_none) == (1, False)
    undo()
    engine.optimizer.zero_grad()
    assert len(discarded) == 1
