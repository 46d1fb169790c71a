"""What acts around DeepSpeed's step: nested in the order of installation, each removable by itself."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from piece_ds.runtime.errors import UserError
from piece_ds.update import masked
from piece_ds.update.decay import SelectedDecay
from piece_ds.zero.adapter import Adapter, Piece
from piece_ds.zero.partial_gradients import refuse_parts


class Engine:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def _take_model_step(self) -> None:
        self.calls.append("step")

    def step(self) -> list[str]:
        self.calls.clear()
        self._take_model_step()
        return list(self.calls)


def install(engine: Engine, name: str) -> Callable[[], None]:
    adapter = SimpleNamespace(engine=engine)  # each hook from an adapter of its own, as two callers have
    return Adapter.around_step(
        adapter,  # type: ignore[arg-type]
        lambda: engine.calls.append(f"before {name}"),
        lambda: engine.calls.append(f"after {name}"),
    )


def test_later_hooks_lie_around_earlier_ones() -> None:
    engine = Engine()
    install(engine, "a")
    install(engine, "b")
    assert engine.step() == ["before b", "before a", "step", "after a", "after b"]


def test_each_hook_is_removed_alone_in_any_order() -> None:
    engine = Engine()
    remove_a, remove_b = install(engine, "a"), install(engine, "b")
    remove_a()
    remove_a()
    assert engine.step() == ["before b", "step", "after b"]
    remove_b()
    assert engine.step() == ["step"]
    assert "_take_model_step" not in engine.__dict__


def test_a_hook_may_remove_itself_while_the_step_runs() -> None:
    engine = Engine()
    removals: list[Callable[[], None]] = []
    removals.append(Adapter.around_step(SimpleNamespace(engine=engine), lambda: removals[0]()))  # type: ignore[arg-type]
    install(engine, "b")
    assert engine.step() == ["before b", "step", "after b"]
    assert engine.step() == ["before b", "step", "after b"]


@pytest.mark.parametrize("whole", [False, True])
def test_decay_is_that_of_adamw_on_what_decays_and_the_rate_stays_the_groups(whole: bool) -> None:
    """Master b lies past a padding of two elements; only a's element 1 and b's element 3 decay, or everything."""
    start = torch.arange(1.0, 11.0)
    master = nn.Parameter(start.clone())
    pieces = [Piece("a", 0, 4, 0), Piece("b", 2, 4, 6)]
    adapter = SimpleNamespace(masters=lambda: [(master, pieces)])
    optimizer = torch.optim.AdamW([master], lr=0.5, weight_decay=0.1)
    index = None if whole else {"a": torch.tensor([1]), "b": torch.tensor([0, 3])}
    decay = SelectedDecay(adapter, index)  # type: ignore[arg-type]
    remove = decay.install(optimizer)
    for step in range(1, 3):
        master.grad = torch.zeros_like(master)
        optimizer.step()
        expected = start.clone()
        expected[slice(None) if whole else [1, 7]] *= (1 - 0.5 * 0.1) ** step
        assert torch.allclose(master.data, expected, rtol=1e-6)
        assert optimizer.param_groups[0]["weight_decay"] == 0.1
    for undo in remove:
        undo()
    optimizer.step()
    assert torch.allclose(master.data, expected * 0.95, rtol=1e-6)  # all of it, by the optimizer itself


def test_every_group_decays_by_its_own_learning_rate() -> None:
    masters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    pieces = [(master, [Piece(name, 0, 2, 0)]) for name, master in zip("ab", masters, strict=True)]
    adapter = SimpleNamespace(masters=lambda: pieces)
    groups = [{"params": [master], "lr": lr} for master, lr in zip(masters, (0.5, 0.25), strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    SelectedDecay(adapter, None).install(optimizer)  # type: ignore[arg-type]
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer.step()
    assert torch.equal(torch.stack([master.data for master in masters]), torch.tensor([[0.95] * 2, [0.975] * 2]))


def test_a_second_part_of_a_gradient_is_refused_but_not_the_next_micro_batch() -> None:
    """A loop may call backward() of the loss itself: its next forward then begins a new count."""
    model = nn.Linear(2, 1)
    engine = SimpleNamespace(
        module=model,
        backward=lambda loss: loss.backward(retain_graph=True),
        zero_optimization_stage=lambda: 2,
    )
    undo = refuse_parts(engine)
    for _ in range(2):
        loss = model(torch.ones(1, 2)).sum()
        loss.backward(retain_graph=True)
    with pytest.raises(UserError, match="comes in several parts"):
        loss.backward(retain_graph=True)
    for _ in range(2):
        engine.backward(loss)
    undo()
    for _ in range(2):
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_masters_and_moments_of_a_checkpoint_are_not_made_anew(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Only before the first step do they follow from the weights."""
    prepared: list[bool] = []

    def nothing(*args: Any) -> Callable[[], None]:
        return lambda: None

    adapter = SimpleNamespace(
        prepare=lambda: prepared.append(True), bind=nothing, install_mask=nothing, masters=list, replicated=True
    )
    hooks = SimpleNamespace(install=lambda *args: [])
    for name in ("require_trainable", "refuse_parts", "even_out_gradients"):
        monkeypatch.setattr(masked, name, nothing)
    monkeypatch.setattr(masked, "adapter_for", lambda engine: adapter)
    monkeypatch.setattr(masked, "StepWatch", lambda adapter: hooks)
    monkeypatch.setattr(masked, "SelectedDecay", lambda adapter, index: hooks)
    engine: Any = SimpleNamespace(global_steps=num_steps, basic_optimizer=None, load_checkpoint=nothing)
    mask: Any = SimpleNamespace(whole=dict)
    masked.MaskedUpdate(engine, mask)
    assert prepared == [True] * (num_steps == 0)
