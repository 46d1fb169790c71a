"""Rows of general text beside a task's: how many, which, with what weight, and the same again after an interruption."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import make_micro_batches, make_model
from torch import Tensor

from piece_ds.training import trainer as trainer_module
from piece_ds.training.general_replay import GeneralReplay
from piece_ds.training.trainer import TaskTrainer

ROWS = [{"row": number} for number in range(50)]


def replay(share: float, seed: int = 1, rows: Any = ROWS) -> GeneralReplay:
    return GeneralReplay(rows, lambda found: {"rows": torch.tensor([row["row"] for row in found])}, share, seed)


def test_each_micro_batch_is_joined_by_the_share_of_its_rows_and_at_least_one() -> None:
    for share, num_rows, want in ((0.25, 8, 2), (0.25, 1, 1), (0.01, 4, 1), (1.0, 6, 6), (0.25, 10, 2), (0.3, 5, 2)):
        assert len(replay(share).drawn(0, num_rows)) == want, (share, num_rows)


def test_rows_depend_on_the_micro_batch_and_the_seed_alone() -> None:
    first, other = replay(0.5), replay(0.5)
    assert [first.drawn(b, 8) for b in range(9)] == [other.drawn(b, 8) for b in range(9)]
    assert first.drawn(7, 8) == other.drawn(7, 8)  # without what came before it
    assert first.drawn(0, 8) != first.drawn(1, 8)
    assert first.drawn(0, 8) != replay(0.5, seed=2).drawn(0, 8)
    assert first.batch(3, 8)["rows"].tolist() == first.drawn(3, 8)


def test_every_row_comes_and_none_twice_in_a_micro_batch_that_has_room() -> None:
    drawn = [replay(1.0).drawn(b, 4) for b in range(200)]
    assert all(len(set(rows)) == 4 for rows in drawn)
    assert {row for rows in drawn for row in rows} == set(range(50))
    few = replay(1.0, rows=ROWS[:3]).drawn(0, 7)
    assert len(few) == 7
    assert sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2]


class Trainer(TaskTrainer):
    """TaskTrainer as far as compute_loss() goes: no engine, no files."""

    def __init__(self, is_summed: bool, accumulation: int) -> None:
        self.losses: list[Tensor] = []
        self._num_tokens = self._num_replayed_tokens = torch.zeros((), dtype=torch.int64)
        self._micro_batch = (-1, 0)
        self.model_accepts_loss_kwargs = is_summed
        self.current_gradient_accumulation_steps = accumulation
        self.state = SimpleNamespace(global_step=0)
        self.args = SimpleNamespace(gradient_accumulation_steps=accumulation)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs


@pytest.fixture
def plain_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' compute_loss, with the model's own mean."""

    def compute_loss(self: Any, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Any:
        outputs = model(**inputs)
        return outputs.loss, outputs

    monkeypatch.setattr(trainer_module.Trainer, "compute_loss", compute_loss)


@pytest.mark.usefixtures("plain_loss")
@pytest.mark.parametrize("is_summed", [True, False])
def test_the_loss_is_the_tasks_plus_the_share_times_the_means_and_tokens_are_counted_apart(is_summed: bool) -> None:
    """A loss that transformers adds up over a step gets its part of the step's mean; one that it averages, all."""
    model, batches = make_model("llama").train(), make_micro_batches("llama", 4)
    task, general = batches[0], batches[1]
    trainer = Trainer(is_summed, accumulation=4)
    asked = []
    trainer.replay = SimpleNamespace(share=0.5, batch=lambda number, rows: asked.append((number, rows)) or general)  # type: ignore[func-returns-value, assignment]
    want = model(**task).loss + 0.5 * model(**general).loss / (4 if is_summed else 1)
    got = trainer.compute_loss(model, dict(task), num_items_in_batch=torch.tensor(9) if is_summed else None)
    torch.testing.assert_close(got, want)
    assert asked == [(0, len(task["input_ids"]))]

    def num_tokens(batch: dict[str, Tensor]) -> int:
        return int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())

    assert int(trainer.take_num_tokens()) == num_tokens(task)
    assert int(trainer.take_num_replayed_tokens()) == num_tokens(general)
    assert int(trainer.take_num_replayed_tokens()) == 0


@pytest.mark.usefixtures("plain_loss")
def test_evaluation_is_joined_by_nothing() -> None:
    model, batch = make_model("llama").eval(), make_micro_batches("llama", 1)[0]
    trainer = Trainer(False, 1)
    trainer.replay = replay(1.0)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)
    assert trainer._micro_batch == (-1, 0)


def test_micro_batches_are_numbered_over_steps_and_ranks_as_rows_are_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed at a step, or on other ranks with the same rows a step, numbers are the same."""

    def numbers(num_ranks: int, accumulation: int, first_step: int = 0) -> set[tuple[int, int]]:
        found = set()
        for own in range(num_ranks):
            monkeypatch.setattr(trainer_module, "world_size", lambda: num_ranks)
            monkeypatch.setattr(trainer_module, "rank", lambda own=own: own)
            trainer = Trainer(False, accumulation)
            for step in range(first_step, 3):
                trainer.state.global_step = step
                found |= {(step, trainer._next_micro_batch()) for _ in range(accumulation)}
        return found

    assert numbers(1, 4) == numbers(2, 2) == numbers(4, 1)
    assert sorted(number for _, number in numbers(2, 2)) == list(range(12))
    assert numbers(2, 2, first_step=2) == {pair for pair in numbers(2, 2) if pair[0] == 2}
