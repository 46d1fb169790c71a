"""Micro-batches of the statistics pass: B consecutive rows each, none dropped, none twice."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from piece_ds.data.collate import MicroBatches
from piece_ds.zero.batch_feed import all_to_device, loss_of


def collate(rows: list[int]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor(rows)}


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("batch_size", [1, 4, 20])
def test_micro_batches_are_consecutive_rows_in_order(num_rows: int, batch_size: int) -> None:
    batches = MicroBatches(list(range(num_rows)), collate, batch_size)
    rows = [batch["input_ids"].tolist() for batch in batches]
    assert [row for batch in rows for row in batch] == list(range(num_rows))
    assert all(len(batch) == batch_size for batch in rows[:-1])
    assert len(batches) == len(rows) == (num_rows + batch_size - 1) // batch_size


def test_no_rows_are_no_micro_batches() -> None:
    assert list(MicroBatches([], collate, 4)) == []


@pytest.mark.parametrize("b", [-1, 2])
def test_index_outside_is_refused(b: int) -> None:
    with pytest.raises(IndexError):
        MicroBatches([1, 2, 3], collate, 2)[b]


class Pair(NamedTuple):
    one: Tensor
    number: int


def test_a_micro_batch_may_hold_whatever_a_collator_gives() -> None:
    """Whole numbers, texts, lists and nested mappings; tensors anywhere in them go to the device."""
    given = {
        "ids": torch.ones(2),
        "length": 7,
        "more": [{"x": torch.ones(1), "text": "t"}],
        "pair": Pair(torch.ones(1), 3),
    }
    moved = all_to_device(given, torch.device("meta"))
    assert moved["ids"].is_meta
    assert moved["more"][0]["x"].is_meta
    assert (moved["length"], moved["more"][0]["text"], moved["pair"].number) == (7, "t", 3)
    assert moved["pair"].one.is_meta
    assert all_to_device([torch.ones(1), 2], torch.device("meta"))[1] == 2


def test_the_loss_is_the_sources_own_where_it_has_one() -> None:
    class Output(NamedTuple):
        loss: Tensor

    def engine(input_ids: Tensor) -> Output:
        return Output(input_ids.float().sum())

    plain = MicroBatches([1, 2], collate, 2)
    own = MicroBatches([1, 2], collate, 2, lambda engine, batch: 10 * engine(**batch).loss)
    assert loss_of(plain, engine, plain[0]) == 3
    assert loss_of(own, engine, own[0]) == 30
    assert loss_of([plain[0]], engine, plain[0]) == 3
