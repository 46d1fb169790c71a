"""Rows of general text beside a task's: how many, which, with what weight, and the same again after an interruption."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.models import PlainEngine, make_micro_batches, make_model, moved
from support.ranks import on_ranks
from torch import Tensor

from piece_ds.config.method_arguments import MethodArguments
from piece_ds.data.collate import Collator, MicroBatches
from piece_ds.evaluation.kept_logits import (
    KeptLogits,
    answer_logits,
    divergence,
    forward_answers,
    keep_logits,
    num_answer_tokens,
)
from piece_ds.runtime.distributed import world_size
from piece_ds.runtime.errors import UserError
from piece_ds.training import general_text as general_text_module
from piece_ds.training import trainer as trainer_module
from piece_ds.training.base_logits import BaseLogits
from piece_ds.training.general_loss import GeneralLoss, general_loss_of
from piece_ds.training.general_replay import GeneralRows, rows_per_row
from piece_ds.training.general_text import GeneralText
from piece_ds.training.trainer import TaskTrainer

NUMBERED = [{"row": number} for number in range(50)]


def numbered(share: float, seed: int = 1, rows: Any = NUMBERED) -> GeneralRows:
    return GeneralRows(rows, lambda found: {"rows": torch.tensor([row["row"] for row in found])}, share, seed)


def test_each_micro_batch_is_joined_by_the_share_of_its_rows_and_at_least_one() -> None:
    for share, num_rows, want in ((0.25, 8, 2), (0.25, 1, 1), (0.01, 4, 1), (1.0, 6, 6), (0.25, 10, 2), (0.3, 5, 2)):
        assert len(numbered(share).drawn(0, num_rows)) == want, (share, num_rows)


def test_rows_depend_on_the_micro_batch_and_the_seed_alone() -> None:
    first, other = numbered(0.5), numbered(0.5)
    assert [first.drawn(b, 8) for b in range(9)] == [other.drawn(b, 8) for b in range(9)]
    assert first.drawn(7, 8) == other.drawn(7, 8)  # without what came before it
    assert first.drawn(0, 8) != first.drawn(1, 8)
    assert first.drawn(0, 8) != numbered(0.5, seed=2).drawn(0, 8)
    assert first.batch(first.drawn(3, 8))["rows"].tolist() == first.drawn(3, 8)


def test_every_row_comes_and_none_twice_in_a_micro_batch_that_has_room() -> None:
    drawn = [numbered(1.0).drawn(b, 4) for b in range(200)]
    assert all(len(set(rows)) == 4 for rows in drawn)
    assert {row for rows in drawn for row in rows} == set(range(50))
    few = numbered(1.0, rows=NUMBERED[:3]).drawn(0, 7)
    assert len(few) == 7
    assert sorted(few[:3]) == sorted(few[3:6]) == [0, 1, 2]


# Five rows of different lengths, one of which has a prompt, for a model of VOCAB words.
TEXT = [
    {"input_ids": [1, *range(7, 7 + length)], "labels": [-100, *range(7, 7 + length)]} for length in (3, 9, 1, 6, 4)
]
TEXT[3]["labels"][1:4] = [-100] * 3
NUM_ANSWER_TOKENS = [3, 9, 1, 3, 4]


def test_rows_beside_a_row_are_those_asked_for_else_the_replays_else_a_quarter(tmp_path: Path) -> None:
    cases = ((None, 0.0, 0.25), (None, 0.5, 0.5), (1.0, 0.0, 1.0), (2.0, 0.5, 2.0), (0.125, 1.0, 0.125))
    for share, replay, expected in cases:
        assert rows_per_row(share, replay) == expected
        flags = MethodArguments(general_share=share, general_replay=replay, general_kl=4.0)
        made = general_loss_of(flags, NUMBERED, Collator(0), seed=1, folder=tmp_path, is_base=True)
        assert made is not None
        assert len(made._rows.drawn(0, 8)) == round(8 * expected)
    for share in (0.0, -1.0, 4.5, float("nan"), float("inf")):
        with pytest.raises(UserError, match="--general_share must be above 0 and at most 4"):
            MethodArguments(general_share=share, general_kl=4.0)


def text_rows(share: float) -> GeneralRows:
    return GeneralRows(TEXT, Collator(0), share, seed=3)


def base_of(folder: Path, is_base: bool = True, rows: Any = TEXT) -> BaseLogits:
    return BaseLogits(rows=rows, collate=Collator(0), batch_size=2, folder=folder, is_base=is_base)


def test_logits_of_an_answer_are_those_that_predict_it() -> None:
    logits = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, -100, 7]])
    assert torch.equal(answer_logits(logits, labels), torch.stack([logits[0, 1], logits[0, 2], logits[1, 2]]))


def test_divergence_is_that_of_the_textbook() -> None:
    now, before = torch.randn(2, 5, 9)
    p, q = F.softmax(before.double(), -1), F.softmax(now.double(), -1)
    torch.testing.assert_close(divergence(now, before).double(), (p * (p / q).log()).sum(), rtol=1e-5, atol=0)


def test_kept_logits_give_back_any_rows_in_any_order_to_the_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        said = torch.randn(6, 5).to(dtype)
        kept = KeptLogits(tmp_path / "logits.bin", [1, 0, 3, 2], 5, dtype)
        kept.write(0, said[:4])
        kept.write(3, said[4:])
        kept.finish()
        assert torch.equal(kept.read([3, 0, 1]), torch.cat([said[4:], said[:1]]))
        assert kept.read([1]).shape == (0, 5)
        assert kept.num_bytes == (tmp_path / "logits.bin").stat().st_size
        kept.close()
        assert not list(tmp_path.iterdir())


def test_any_number_of_ranks_keeps_the_same_logits(tmp_path: Path) -> None:
    """Three micro-batches on two ranks: one rank has none in the last round."""

    def keep() -> Tensor:
        engine = PlainEngine(make_model("llama").bfloat16())
        batches = MicroBatches(TEXT, Collator(0), 2)
        kept = keep_logits(engine, batches, tmp_path / f"{world_size()}.bin", "test")
        return kept.read(range(5))

    alone, *ranks = [*on_ranks(1, keep), *on_ranks(2, keep)]
    assert alone.shape[0] == sum(NUM_ANSWER_TOKENS)
    assert alone.dtype == torch.bfloat16
    assert all(torch.equal(alone, other) for other in ranks)


def test_the_loss_is_replays_and_the_divergence_from_the_base_and_so_is_its_gradient(tmp_path: Path) -> None:
    """Against plain PyTorch with a second model, row by row without padding."""
    base, model = make_model("llama"), make_model("llama")
    for replay_weight, kl_weight in ((0.5, 0.0), (0.0, 2.0), (0.5, 2.0)):
        term = GeneralLoss(
            text_rows(0.75), replay_weight=replay_weight, kl_weight=kl_weight, base=base_of(tmp_path / str(kl_weight))
        )
        assert (term.begin(PlainEngine(base)) is None) == (kl_weight == 0)
        tuned = moved(make_model("llama"))
        got = term.loss(tuned, number=4, num_rows=4, device=torch.device("cpu"))
        got.backward()

        # The same by hand.
        model.load_state_dict(moved(make_model("llama")).state_dict())
        model.zero_grad()
        loss = apart = torch.zeros(())
        num_tokens = 0
        chosen = text_rows(0.75).drawn(4, 4)
        for row in chosen:
            ids, labels = (torch.tensor([TEXT[row][name]]) for name in ("input_ids", "labels"))
            counted = labels[0, 1:] != -100
            now = model(input_ids=ids).logits[0, :-1][counted].log_softmax(-1)
            with torch.no_grad():
                before = base(input_ids=ids).logits[0, :-1][counted].log_softmax(-1)
            loss = loss - now.gather(1, labels[0, 1:][counted, None]).sum()
            apart = apart + (before.exp() * (before - now)).sum()
            num_tokens += int(counted.sum())
        want = (replay_weight * loss + kl_weight * apart) / num_tokens
        want.backward()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for (name, param), other in zip(tuned.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-3, atol=1e-6, msg=name)

        # What the log says of it.
        row = term.take_row()
        assert row["general_tokens"] == sum(len(TEXT[row]["input_ids"]) for row in chosen) == term.num_tokens
        assert row["general_loss"] == pytest.approx(loss.item() / num_tokens, rel=1e-5)
        assert ("general_kl" in row) == (kl_weight > 0)
        assert row.get("general_kl", 0.0) == pytest.approx(apart.item() / num_tokens if kl_weight else 0.0, rel=1e-4)
        assert term.take_row()["general_tokens"] == 0
        assert term.num_tokens == row["general_tokens"]  # of the whole task, not since the last call


def test_the_base_model_itself_diverges_by_nothing(tmp_path: Path) -> None:
    model = make_model("llama")
    term = GeneralLoss(text_rows(1.0), kl_weight=1.0, base=base_of(tmp_path))
    term.begin(PlainEngine(model))
    assert abs(term.loss(model, 0, 5, torch.device("cpu")).item()) < 1e-6


def test_later_the_base_models_logits_are_read_and_never_those_of_a_model_that_has_moved(tmp_path: Path) -> None:
    first = base_of(tmp_path).take(PlainEngine(make_model("llama"))).read(range(5))
    other = PlainEngine(moved(make_model("llama")))
    for base, has_moved in ((base_of(tmp_path, is_base=False), False), (base_of(tmp_path), True)):
        assert torch.equal(base.take(other, has_moved).read(range(5)), first)
    with pytest.raises(UserError, match="other text"):
        base_of(tmp_path, is_base=False, rows=TEXT[:4]).take(other)
    (tmp_path / "base.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="has 5 bytes"):
        base_of(tmp_path, is_base=False).take(other)
    (tmp_path / "base.json").unlink()
    with pytest.raises(UserError, match="no longer the base model"):
        base_of(tmp_path, is_base=False).take(other)


class Trainer(TaskTrainer):
    """TaskTrainer as far as compute_loss() goes: no engine, no files."""

    def __init__(self, is_summed: bool, accumulation: int) -> None:
        self.losses: list[Tensor] = []
        self._num_tokens = torch.zeros((), dtype=torch.int64)
        self._micro_batch = (-1, 0)
        self.model_accepts_loss_kwargs = is_summed
        self.current_gradient_accumulation_steps = accumulation
        self.state = SimpleNamespace(global_step=0)
        self.args = SimpleNamespace(gradient_accumulation_steps=accumulation)


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
    rows = GeneralRows(range(3), lambda chosen: general, 0.5, 0)
    trainer.general = GeneralLoss(rows, replay_weight=0.5)
    want = model(**task).loss + 0.5 * model(**general).loss / (4 if is_summed else 1)
    got = trainer.compute_loss(model, dict(task), num_items_in_batch=torch.tensor(9) if is_summed else None)
    torch.testing.assert_close(got, want)

    def num_tokens(batch: dict[str, Tensor]) -> int:
        return int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())

    # The last step of an epoch may have fewer micro-batches.
    trainer.current_gradient_accumulation_steps = 3
    assert float(trainer._as_expected(torch.tensor(6.0), torch.tensor(9))) == (2.0 if is_summed else 6.0)

    assert int(trainer.take_num_tokens()) == num_tokens(task)
    assert trainer.general.take_row()["general_tokens"] == num_tokens(general)


@pytest.mark.usefixtures("plain_loss")
def test_evaluation_is_joined_by_nothing() -> None:
    model, batch = make_model("llama").eval(), make_micro_batches("llama", 1)[0]
    trainer = Trainer(False, 1)
    trainer.general = GeneralLoss(numbered(1.0), replay_weight=1.0)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss)
    assert trainer._micro_batch == (-1, 0)


def test_micro_batches_are_numbered_over_steps_and_ranks_as_rows_are_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed at a step, or on other ranks with the same rows a step, numbers are the same."""

    def numbers(num_ranks: int, accumulation: int, first_step: int = 0) -> set[tuple[int, int]]:
        found = set()
        for own in range(num_ranks):
            for module in (trainer_module, general_text_module):
                monkeypatch.setattr(module, "world_size", lambda: num_ranks)
                monkeypatch.setattr(module, "rank", lambda own=own: own)
            trainer = Trainer(False, accumulation)
            of_callback = object.__new__(GeneralText)  # that of any other trainer counts alike
            of_callback._trainer, of_callback._micro_batch = trainer, (-1, 0)
            for step in range(first_step, 3):
                trainer.state.global_step = step
                for _ in range(accumulation):
                    number = trainer._next_micro_batch()
                    assert of_callback._next_micro_batch() == number
                    found.add((step, number))
        return found

    assert numbers(1, 4) == numbers(2, 2) == numbers(4, 1)
    assert sorted(number for _, number in numbers(2, 2)) == list(range(12))
    assert numbers(2, 2, first_step=2) == {pair for pair in numbers(2, 2) if pair[0] == 2}


def test_a_labelled_first_token_is_no_answer_token_since_nothing_predicts_it() -> None:
    labels = [[5, 6, -100, 7], [-100, -100, 8, -100], [9]]
    assert num_answer_tokens([{"labels": row} for row in labels]) == [2, 1, 0]
    for row in labels:
        kept = answer_logits(torch.zeros(1, len(row), 3), torch.tensor([row]))
        assert len(kept) == num_answer_tokens([{"labels": row}])[0]


def test_logits_are_taken_without_dropout_and_the_mode_is_restored() -> None:
    model = make_model("llama").train()
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, out: F.dropout(out, 0.5, training=module.training)
    )
    batch = {name: torch.tensor([TEXT[0][name]]) for name in ("input_ids", "labels")}
    first, again = (forward_answers(model, batch) for _ in range(2))
    assert torch.equal(first, again)
    assert not first.requires_grad
    assert all(module.training for module in model.modules())
