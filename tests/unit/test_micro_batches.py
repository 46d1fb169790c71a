"""Micro-batches of the statistics pass: B consecutive rows each, none dropped, none twice."""

import pytest
import torch
from torch import Tensor

from piece_ds.data.collate import MicroBatches


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
