"""Values, moments and counters of the selected weights go from one sharding to another; the next step is the same."""

from types import SimpleNamespace
from typing import Any

import torch
from support.ranks import on_ranks
from torch import Tensor, nn

from piece_ds.zero.adapter import Piece
from piece_ds.zero.selected_state import (
    MOMENTS,
    SelectedState,
    count_moments_elsewhere,
    read_selected_state,
    write_selected_state_,
)

INDEX = {"a": torch.tensor([1, 4]), "b": torch.tensor([0, 3])}
COUNTERS = {"global_steps": 3, "global_samples": 24, "micro_steps": 6, "skipped_steps": 1}
SCALER = {"cur_scale": 512.0, "cur_iter": 4, "last_overflow_iter": 1, "cur_hysteresis": 2}

# Two shardings of a (6 elements) and b (5): side by side with padding between, and cut inside both.
TOGETHER = [(13, [Piece("a", 0, 6, 0), Piece("b", 0, 5, 8)])]
CUT = [(5, [Piece("a", 0, 4, 1)]), (7, [Piece("a", 4, 2, 0), Piece("b", 0, 2, 2)]), (3, [Piece("b", 2, 3, 0)])]


def place(pieces: list[Piece], of: dict[str, Tensor], flat: Tensor) -> None:
    """Write whole parameters' elements to where a sharding has them."""
    for piece in pieces:
        flat[piece.offset : piece.offset + piece.numel] = of[piece.name][piece.start : piece.start + piece.numel]


class Adapter:
    """As much of an engine's adapter as state goes through: masters, torch's AdamW, counters and a loss scaler."""

    def __init__(self, sharding: list[tuple[int, list[Piece]]]) -> None:
        self.found = [(nn.Parameter(torch.zeros(numel)), pieces) for numel, pieces in sharding]
        for master, pieces in self.found:
            place(pieces, {"a": torch.arange(6.0), "b": torch.arange(5.0) - 9}, master.data)
        scaler = SimpleNamespace(**dict.fromkeys(SCALER, 0))
        self.engine = SimpleNamespace(
            basic_optimizer=torch.optim.AdamW([master for master, _ in self.found], lr=0.1, weight_decay=0.0),
            optimizer=SimpleNamespace(loss_scaler=scaler),
            lr_scheduler=None,
            **dict.fromkeys(COUNTERS, 0),
        )

    def masters(self) -> list[tuple[Tensor, list[Piece]]]:
        return list(self.found)  # type: ignore[arg-type]

    def step(self, number: int, where: dict[str, Tensor] = INDEX) -> None:
        """Step with a gradient of some elements alone."""
        grads = {name: torch.zeros(numel) for name, numel in (("a", 6), ("b", 5))}
        for name, index in where.items():
            grads[name][index] = torch.sin(index + number + 1.0)
        for master, pieces in self.found:
            master.grad = torch.zeros_like(master)
            place(pieces, grads, master.grad)
        self.engine.basic_optimizer.step()


def trained() -> Any:
    adapter = Adapter(TOGETHER)
    for number in range(3):
        adapter.step(number)
    vars(adapter.engine).update(COUNTERS)
    vars(adapter.engine.optimizer.loss_scaler).update(SCALER)
    return adapter


def test_a_state_goes_on_in_another_sharding_as_in_its_own() -> None:
    first, second = trained(), Adapter(CUT)
    state = read_selected_state(first, INDEX)
    assert state.step == 3
    # In this sharding a begins at 0 of the one master and b at 8: a[1], a[4], b[0], b[3].
    ((master, _),) = first.found
    kept = {"values": master, **{name: first.engine.basic_optimizer.state[master][name] for name in MOMENTS}}
    assert all(torch.equal(state.tensors[name], whole[torch.tensor([1, 4, 8, 11])]) for name, whole in kept.items())
    write_selected_state_(second, INDEX, state)  # type: ignore[arg-type]
    assert {name: getattr(second.engine, name) for name in COUNTERS} == COUNTERS
    assert vars(second.engine.optimizer.loss_scaler) == SCALER
    for number in (3, 4):
        first.step(number)
        second.step(number)
    ends = [read_selected_state(adapter, INDEX) for adapter in (first, second)]
    assert ends[0].step == ends[1].step == 5
    for name, values in ends[0].tensors.items():
        assert torch.equal(values, ends[1].tensors[name]), name


def test_a_state_without_a_step_yet_goes_on_as_its_own() -> None:
    """All steps so far overflowed, say: moments of 0 steps, of which a first step is the first."""
    first, second = Adapter(TOGETHER), Adapter(CUT)
    state = read_selected_state(first, INDEX)  # type: ignore[arg-type]
    assert state.step == 0
    assert not any(state.tensors[name].any() for name in MOMENTS)
    write_selected_state_(second, INDEX, state)  # type: ignore[arg-type]
    for adapter in (first, second):
        adapter.step(0)
    ends = [read_selected_state(adapter, INDEX) for adapter in (first, second)]  # type: ignore[arg-type]
    assert ends[0].step == ends[1].step == 1
    for name, values in ends[0].tensors.items():
        assert torch.equal(values, ends[1].tensors[name]), name


def test_moments_are_fp32_where_the_masters_are_bf16() -> None:
    """DeepSpeed's bf16 optimizer keeps them so; torch's AdamW makes them in the master's dtype if they are missing."""
    state = read_selected_state(trained(), INDEX)
    target: Any = Adapter(CUT)
    for master, _ in target.found:
        master.data = master.data.bfloat16()
    write_selected_state_(target, INDEX, state)
    kept = [target.engine.basic_optimizer.state[master] for master, _ in target.found]
    assert all(moments[name].dtype == torch.float32 for moments in kept for name in MOMENTS)
    assert all(master.dtype == torch.bfloat16 for master, _ in target.found)
    again = read_selected_state(target, INDEX)
    for name in MOMENTS:
        assert torch.equal(again.tensors[name], state.tensors[name])


def test_what_several_ranks_hold_is_read_once() -> None:
    """At stage 0 every rank has everything: the state is that of one, not their sum."""
    alone = read_selected_state(trained(), INDEX)

    def work() -> SelectedState:
        return read_selected_state(trained(), INDEX)

    for found in on_ranks(2, work):
        assert (found.step, found.counters) == (alone.step, alone.counters)
        assert all(torch.equal(values, alone.tensors[name]) for name, values in found.tensors.items())


def test_moments_of_weights_outside_a_selection_are_counted_on_every_rank_that_holds_them() -> None:
    """Of 6 and 5 elements with moments 2 each are selected; padding has none, nor have masters before a step."""
    everything = {"a": torch.arange(6), "b": torch.arange(5)}
    for sharding in (TOGETHER, CUT):
        adapter: Any = Adapter(sharding)
        assert count_moments_elsewhere(adapter, INDEX) == 0
        adapter.step(0)
        assert count_moments_elsewhere(adapter, INDEX) == 0
        assert count_moments_elsewhere(adapter, {"a": INDEX["a"][:1]}) == 3
        adapter.step(1, everything)
        assert count_moments_elsewhere(adapter, INDEX) == 11 - 4
        assert count_moments_elsewhere(adapter, {"b": INDEX["b"]}) == 11 - 2
        assert count_moments_elsewhere(adapter, everything) == 0
        assert on_ranks(2, lambda adapter=adapter: count_moments_elsewhere(adapter, INDEX)) == [14, 14]


def test_steps_that_an_optimizer_counts_in_its_groups_are_read_and_set_there() -> None:
    """DeepSpeed's FusedAdam, whose state holds moments alone. Groups that had no gradient are behind."""

    class Fused:
        def __init__(self, steps: list[int], state: dict[Tensor, dict[str, Any]]) -> None:
            self.param_groups: list[dict[str, Any]] = [*({"step": step} for step in steps), {"lr": 0.1}]
            self.state = state

    first, second = trained(), Adapter(CUT)
    moments = {m: {name: s[name] for name in MOMENTS} for m, s in first.engine.basic_optimizer.state.items()}
    for steps, expected in (([4, 5], 5), ([5, 4], 5), ([0], 0), ([], 0)):
        first.engine.basic_optimizer = Fused(steps, moments)
        assert read_selected_state(first, INDEX).step == expected, steps
    first.engine.basic_optimizer, second.engine.basic_optimizer = Fused([7, 6], moments), Fused([0, 1], {})
    state = read_selected_state(first, INDEX)
    write_selected_state_(second, INDEX, state)  # type: ignore[arg-type]
    assert second.engine.basic_optimizer.param_groups == [{"step": 7}, {"step": 7}, {"lr": 0.1}]
    kept = [second.engine.basic_optimizer.state[master]["step"] for master, _ in second.found]
    assert kept == [7] * len(CUT)
    assert not any(isinstance(step, Tensor) for step in kept)  # as DeepSpeed's optimizers have it
    assert read_selected_state(second, INDEX).step == 7  # type: ignore[arg-type]
