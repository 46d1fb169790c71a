"""What acts around DeepSpeed's step: nested in the order of installation, each removable by itself."""

from collections.abc import Callable
from types import SimpleNamespace

from piece_ds.zero.adapter import Adapter


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
