"""--importance_rows and --max_train_samples: which rows a pass over the data sees."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.fakes import faked
from support.models import make_model
from torch import Tensor
from transformers import AutoTokenizer

from piece_ds.config.arguments import DataArguments
from piece_ds.config.method_arguments import MethodArguments
from piece_ds.data.collate import MicroBatches
from piece_ds.data.tasks import load_task_stream
from piece_ds.demo.model import make_tokenizer
from piece_ds.methods import estimate
from piece_ds.state.statistics import GradientStats, empty_stats
from piece_ds.training.mask_source import MaskSource


class Engine:
    """What estimate_mask() sees of an engine when somebody else takes the statistics."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.module = make_model("llama")


def collate(rows: list[Any]) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}


ROWS = [{"input_ids": [i, i]} for i in range(10)]


def rows_of(batches: MicroBatches) -> list[int]:
    return [int(ids) for batch in batches for ids in batch["input_ids"][:, 0]]


@pytest.mark.parametrize("rows", [ROWS, datasets.Dataset.from_list(ROWS)], ids=["list", "dataset"])
def test_the_first_rows_make_whole_micro_batches_and_a_last_one(rows: Any) -> None:
    batches = MicroBatches(rows, collate, 4)
    assert rows_of(batches.first(6)) == [0, 1, 2, 3, 4, 5]
    assert len(batches.first(6)) == 2
    assert batches.first(10) is batches.first(99) is batches


def test_estimation_and_the_runs_source_see_only_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def collected(engine: Engine, batches: MicroBatches, **options: Any) -> GradientStats:
        seen.append(rows_of(batches))
        return empty_stats(options["layout"], options["needs_sum"], "cpu")

    faked(monkeypatch, estimate, "collect_statistics").collect_statistics.side_effect = collected
    estimate.estimate_mask(Engine(), MicroBatches(ROWS, collate, 4), importance_rows=6)
    flags = MethodArguments(importance_rows=3)
    source = MaskSource(config=flags.config(), files=flags, task="t")
    assert rows_of(source.batches(ROWS, collate)) == [0, 1, 2]
    estimate.estimate_mask(Engine(), source.batches(ROWS, collate), source.config)
    assert seen == [[0, 1, 2, 3, 4, 5], [0, 1, 2]]
    with pytest.raises(ValueError, match="importance_rows is 3, but micro_batches is a list"):
        estimate.estimate_mask(Engine(), [collate(ROWS)], importance_rows=3)


def test_training_sees_the_first_samples_and_judging_all(tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {i}", "answer": str(i)} for i in range(7)]
        (tmp_path / f"{split}.json").write_text(json.dumps(rows))
    make_tokenizer(64).save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (tmp_path / "a").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").rename(tmp_path / "a" / f"{split}.json")
    arguments = DataArguments(task_dir=str(tmp_path), tasks="a", max_train_samples=3)
    (task,) = load_task_stream(arguments, tokenizer)
    assert (len(task.train), len(task.test)) == (3, 7)
    assert "train 0" in tokenizer.decode(task.train[0]["input_ids"])
