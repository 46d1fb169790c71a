"""Best-fit packs: every row once, equal numbers for all ranks, and the loss and gradients of padded batches."""

import random
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from support.models import make_model
from torch import Tensor, nn
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback

from piece_ds.config.arguments import DataArguments
from piece_ds.data.collate import Collator
from piece_ds.data.packs import PackCollator, Packs, best_fit, divided, pack_rows
from piece_ds.runtime.errors import UserError
from piece_ds.training.trainer import TaskTrainer


def rows_of(lengths: list[int], seed: int = 0) -> datasets.Dataset:
    """Rows of random tokens; the first half of each gives no loss, and its number is its first token."""
    rng = random.Random(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = [number, *(rng.randrange(60) for _ in range(length - 1))]
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return datasets.Dataset.from_list(rows)


def numbers_in(batch: Any) -> list[int]:
    """The numbers of the rows in a batch of packs."""
    return batch["input_ids"][batch["position_ids"] == 0].tolist()


def fewest_packs(lengths: list[int], num_tokens: int) -> int:
    """By trying every assignment."""

    def fits(num_packs: int) -> bool:
        return any(
            all(sum(n for n, at in zip(lengths, where, strict=True) if at == pack) <= num_tokens for pack in where)
            for where in product(range(num_packs), repeat=len(lengths))
        )

    return next(count for count in range(1, len(lengths) + 1) if fits(count))


def test_packs_cover_every_row_once_within_the_budget() -> None:
    rng = random.Random(1)
    for num_rows, num_tokens in ((1, 10), (7, 10), (300, 64), (2000, 4096)):
        lengths = [rng.randint(2, min(num_tokens + 2, 900)) for _ in range(num_rows)]
        packs = best_fit(lengths, num_tokens)
        assert sorted(number for pack in packs for number in pack) == list(range(num_rows))
        for pack in packs:
            assert sum(lengths[number] for number in pack) <= num_tokens or len(pack) == 1
        assert packs == best_fit(lengths, num_tokens)

        # No two packs could be one; and the bound of best-fit decreasing: 11/9 of the fewest + 1, at least by volume.
        sizes = sorted(sum(lengths[number] for number in pack) for pack in packs)
        assert len(sizes) < 2 or sizes[0] + sizes[1] > num_tokens
        assert len(packs) <= 11 / 9 * max(sum(sizes) / num_tokens, sum(2 * n > num_tokens for n in lengths)) + 1 + (
            0.5 * len(packs) if num_rows < 10 else 0.02 * len(packs)
        )


def test_few_rows_are_packed_as_well_as_any_assignment_does() -> None:
    rng = random.Random(2)
    for _ in range(30):
        lengths = [rng.randint(2, 10) for _ in range(5)]
        assert len(best_fit(lengths, 12)) == fewest_packs(lengths, 12)
    assert best_fit([3, 9, 4, 6, 2], 10) == [[1], [3, 2], [0, 4]]
    assert len(best_fit([7, 6, 3, 2, 2], 10)) == 2  # into the fullest pack: into the emptiest it would be three


def test_a_row_whose_every_token_counts_does_not_count_its_first_in_a_pack() -> None:
    """As in text that is learned whole: the token before it is another row's."""
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2)
    assert Packs(rows, [[0, 1]])[0] == {
        "input_ids": [5, 6, 7, 5, 6, 7],
        "labels": [-100, 6, 7, -100, 6, 7],
        "position_ids": [0, 1, 2, 0, 1, 2],
    }


def test_packs_are_divided_into_whole_steps() -> None:
    assert divided([[0, 1, 2, 3], [4], [5, 6]], 3) == [[0, 1, 2, 3], [4], [5, 6]]
    for target in (3, 4, 5, 6, 7):
        packs = divided([[0, 1, 2, 3], [4], [5, 6]], target)
        assert len(packs) == target
        assert all(packs)
        assert sorted(number for pack in packs for number in pack) == list(range(7))
    rows = rows_of([5] * 10)
    assert len(pack_rows("a", rows, 50, 4)) == 4
    assert pack_rows("a", rows, 10, 1).summary(10) == "10 rows in 5 packs of at most 10 tokens, 100% full"
    assert pack_rows("a", rows, 4, 5).summary(4).endswith("; 10 longer rows stand alone")
    with pytest.raises(UserError, match=r"the 10 rows of task a make 10 packs, and a step takes 4 .* divided into 12"):
        pack_rows("a", rows, 5, 4)


def test_pack_tokens_needs_packing() -> None:
    assert DataArguments(packing=True, pack_tokens=64).pack_tokens == 64
    with pytest.raises(UserError, match="--pack_tokens belongs to --packing"):
        DataArguments(pack_tokens=64)
    with pytest.raises(UserError, match="pack_tokens"):
        DataArguments(packing=True, pack_tokens=0)


def test_every_rank_takes_as_many_packs_and_together_each_row_once() -> None:
    """The sharding is accelerate's own, as a DataLoader of the Trainer has it."""
    lengths = [random.Random(3).randint(2, 20) for _ in range(101)]
    for num_ranks, batch_size, accumulation in ((1, 1, 1), (2, 1, 4), (3, 2, 1), (4, 1, 1)):
        packs = pack_rows("a", rows_of(lengths), 32, num_ranks * batch_size * accumulation)
        order = torch.randperm(len(packs)).tolist()
        shards = [
            list(BatchSamplerShard(BatchSampler(order, batch_size, False), num_ranks, rank))
            for rank in range(num_ranks)
        ]
        assert len({len(shard) for shard in shards}) == 1
        assert len(shards[0]) % accumulation == 0
        taken = [number for shard in shards for batch in shard for index in batch for number in packs.packs[index]]
        assert sorted(taken) == list(range(101))


def test_a_micro_batch_of_packs_has_the_loss_and_gradients_of_the_padded_rows() -> None:
    model = make_model("llama").train()
    rows = rows_of([random.Random(4).randint(2, 24) for _ in range(23)])
    packs = pack_rows("a", rows, 32, 2)
    for first in range(0, len(packs), 2):
        batch = PackCollator()([packs[first], packs[first + 1]])
        chosen = packs.packs[first] + packs.packs[first + 1]
        assert numbers_in(batch) == chosen
        found = []
        for inputs in (batch, Collator(pad_id=0)([rows[number] for number in chosen])):
            model.zero_grad()
            loss = model(**inputs).loss
            loss.backward()
            found.append((loss.item(), torch.cat([param.grad.view(-1) for param in model.parameters()])))
        assert found[0][0] == pytest.approx(found[1][0], abs=2e-6)
        assert float((found[0][1] - found[1][1]).abs().max()) < 5e-6 * float(found[1][1].abs().max())


def trainer_of(folder: Path, packs: Packs, model: nn.Module, kind: type[Trainer] = Trainer, **settings: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    return kind(model=model, args=arguments, train_dataset=packs, data_collator=PackCollator())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_an_epoch_trains_every_row_once_and_resumes_in_its_middle(tmp_path: Path) -> None:
    rows = rows_of([random.Random(5).randint(2, 24) for _ in range(40)])
    packs = pack_rows("a", rows, 48, 2)

    def train(folder: Path, stop: int | None, resume: bool | str = False) -> tuple[list[list[int]], nn.Module]:
        model = make_model("llama").train()
        seen: list[list[int]] = []
        model.register_forward_pre_hook(lambda _, __, inputs: seen.append(numbers_in(inputs)), with_kwargs=True)
        trainer = trainer_of(folder, packs, model, num_train_epochs=2, save_steps=3, save_strategy="steps")
        if stop is not None:
            trainer.add_callback(StopAt(stop))
        trainer.train(resume_from_checkpoint=resume)
        return seen, model

    whole, expected = train(tmp_path / "whole", None)
    num_steps = len(packs) // 2
    assert num_steps > 4
    for epoch in (whole[: len(packs)], whole[len(packs) :]):
        assert Counter(number for batch in epoch for number in batch) == Counter(range(40))
    assert whole[: len(packs)] != whole[len(packs) :]

    # The checkpoint lies in the middle of the first epoch.
    train(tmp_path / "cut", 3)
    rest, found = train(tmp_path / "cut", None, str(tmp_path / "cut" / "checkpoint-3"))
    assert rest == whole[6:]
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_a_step_divides_by_all_answer_tokens_of_its_packs(tmp_path: Path) -> None:
    """Packs of few answer tokens weigh no more than others: the step is that of one padded batch of all rows."""
    rows = rows_of([24, 3, 5, 20, 4, 9])
    packs = pack_rows("a", rows, 28, 2)
    assert len(packs) > 2
    model, by_hand = make_model("llama").train(), make_model("llama").train()
    trainer_of(tmp_path, packs, model, max_steps=1, train_sampling_strategy="sequential").train()
    taken = packs.packs[0] + packs.packs[1]
    by_hand(**Collator(pad_id=0)([rows[number] for number in taken])).loss.backward()
    with torch.no_grad():
        for param, moved in zip(by_hand.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(moved, param - 0.1 * param.grad, rtol=0, atol=2e-6)


def test_general_text_joins_a_pack_by_the_rows_in_it_and_adds_its_share(tmp_path: Path) -> None:
    """A pack is one row of a batch and holds many of the file: S of those are joined, and the pack's mean stays."""
    rows = rows_of([24, 3, 5, 20, 4, 9, 7, 6, 5, 5, 4, 4])
    packs = pack_rows("a", rows, 28, 2)
    model = make_model("llama").train()
    trainer = trainer_of(tmp_path, packs, model, TaskTrainer)
    asked: list[int] = []

    class Text:
        def loss(self, model: nn.Module, number: int, num_rows: int, device: torch.device) -> Tensor:
            asked.append(num_rows)
            return torch.tensor(0.5)

    assert isinstance(trainer, TaskTrainer)
    trainer.general = Text()  # type: ignore[assignment]
    for place, pack in enumerate(packs.packs):
        batch = PackCollator()([packs[place]])
        apart = sum(model(**Collator(pad_id=0)([rows[n]])).loss.item() * len(counted(rows[n])) for n in pack)
        want = apart / sum(len(counted(rows[number])) for number in pack) + 0.5
        assert trainer.compute_loss(model, batch).item() == pytest.approx(want, abs=2e-6)
    assert asked == [round(len(rows) / len(packs))] * len(packs)
    assert asked[0] > 1


def counted(row: Any) -> list[int]:
    """Labels of a row that give a loss: no token predicts the first."""
    return [label for label in row["labels"][1:] if label != -100]
