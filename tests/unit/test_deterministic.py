"""The statistics pass on CUDA asks for deterministic algorithms, and says so where torch has none.

No accelerator is needed: the switch is torch's own, and put_ has no deterministic form on a CPU either.
"""

import logging
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import make_micro_batches, make_model
from support.nondeterministic import install, put
from torch import nn

from piece_ds.runtime.deterministic import deterministic_algorithms, deterministic_run, nondeterministic_operation
from piece_ds.runtime.errors import UserError
from piece_ds.zero import statistics
from piece_ds.zero.statistics import collect_statistics

BATCHES = make_micro_batches("llama", 3)


class Engine:
    """What the pass asks of an engine at ZeRO stage 0."""

    device = torch.device("cpu")
    optimizer = None

    def __init__(self, model: nn.Module) -> None:
        self.module = model

    def __call__(self, **batch: Any) -> Any:
        return self.module(**batch)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def fp16_enabled(self) -> bool:
        return False


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call that the pass makes to end a backward; the pass behaves as on CUDA."""
    calls: list[str] = []
    adapter = SimpleNamespace(
        local_backward=nullcontext,
        forget_backward=lambda: calls.append("forget"),
        abandon_backward=lambda: calls.append("abandon"),
    )
    monkeypatch.setattr(statistics, "adapter_for", lambda engine: adapter)
    monkeypatch.setattr(statistics, "_may_vary", lambda device: True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    return calls


def state() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )


def test_algorithms_are_deterministic_inside_and_as_before_after(abandoned: list[str]) -> None:
    model, seen = make_model("llama"), []
    model.register_forward_hook(lambda *_: seen.append(state()))
    before = state()
    collect_statistics(Engine(model), BATCHES)
    assert seen == [(True, False, False)] * len(BATCHES)
    assert state() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert abandoned == ["forget"]


def test_what_was_set_before_is_set_after_also_after_an_error() -> None:
    before = state()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(ValueError, match="any"), deterministic_algorithms():
            raise ValueError("any")
        assert state() == (True, True, before[2])
    finally:
        torch.use_deterministic_algorithms(before[0])


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_operation_without_deterministic_form_is_named_and_the_pass_repeated(
    where: str, abandoned: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    with monkeypatch.context() as plain:
        plain.setattr(statistics, "_may_vary", lambda device: False)
        want = collect_statistics(Engine(model), BATCHES)
    install(model.model.layers[1].mlp, where)
    abandoned.clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        got = collect_statistics(Engine(model), BATCHES)
    assert abandoned == ["abandon", "forget"]
    assert got.num_micro_batches == len(BATCHES)
    assert torch.equal(got.square_sum, want.square_sum)
    assert torch.equal(got.grad_sum, want.grad_sum)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("put_ has no deterministic form")
    assert "\n" not in message


def test_sums_of_an_unfinished_pass_are_begun_with_again(abandoned: list[str]) -> None:
    """The second try must not add to what the first has added."""

    class Keeper:
        def begin(self, stats: Any) -> None:
            stats.square_sum.fill_(1.0)
            stats.num_micro_batches = 1

        def is_due(self, num_done: int) -> bool:
            return False

    model = make_model("llama")
    want = collect_statistics(Engine(model), BATCHES, keeper=Keeper())  # type: ignore[arg-type]
    install(model.model.layers[0], "backward")
    got = collect_statistics(Engine(model), BATCHES, keeper=Keeper())  # type: ignore[arg-type]
    assert torch.equal(got.square_sum, want.square_sum)


def test_another_error_is_raised_as_it_is(abandoned: list[str]) -> None:
    model = make_model("llama")

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect_statistics(Engine(model), BATCHES)
    assert abandoned == []


def test_a_caller_who_asked_for_determinism_gets_the_error(abandoned: list[str]) -> None:
    model = make_model("llama")
    install(model.model.layers[0], "forward")
    with deterministic_algorithms(), pytest.raises(RuntimeError, match="put_"):
        collect_statistics(Engine(model), BATCHES)


def test_operations_are_named() -> None:
    switch = "set 'torch.use_deterministic_algorithms(True)'"
    cases = {
        f"foo_backward_cuda does not have a deterministic implementation, but you {switch}.": "foo_backward_cuda",
        f"Deterministic behavior was enabled with {switch},\n but CuBLAS": f"Deterministic behavior was enabled with "
        f"{switch}, but CuBLAS",
        "out of memory": None,
    }
    for message, name in cases.items():
        assert nondeterministic_operation(RuntimeError(message)) == name
    assert nondeterministic_operation(ValueError(f"foo {switch}")) is None


def test_a_run_that_must_be_deterministic_ends_in_one_line_that_names_the_operation() -> None:
    before = state()
    with pytest.raises(UserError, match=r"--deterministic: put_ has no") as caught, deterministic_run(True):
        put(torch.ones(3))
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="out of memory"), deterministic_run(True):
        raise RuntimeError("out of memory")
    assert state() == before
    with deterministic_run(False):
        put(torch.ones(3))
