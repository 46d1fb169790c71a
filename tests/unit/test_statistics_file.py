"""Saved statistics come back bit for bit, and are refused where they are of something else."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import nn

from piece_ds.checkpoint import statistics_file
from piece_ds.checkpoint.statistics_file import PartialStatistics, load_statistics, save_statistics
from piece_ds.config.method_arguments import MethodArguments
from piece_ds.data.collate import MicroBatches
from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats, empty_stats
from piece_ds.training import mask_source

LAYOUT = layout_of(nn.Sequential(nn.Linear(7, 3), nn.Linear(3, 1)))
SOURCE = {"file": "rows.json", "batch": 4}


def make_stats(with_sum: bool = True) -> GradientStats:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(LAYOUT.num_owned, generator=generator)
    return GradientStats(LAYOUT, sums.square() * 1e-40, sums if with_sum else None, 9, 2)  # squares are denormal


def test_statistics_come_back_bit_for_bit(tmp_path: Path) -> None:
    stats = make_stats()
    save_statistics(tmp_path, stats, SOURCE)
    again = load_statistics(tmp_path, LAYOUT, needs_sum=True, source=SOURCE)
    assert torch.equal(again.square_sum, stats.square_sum)
    assert again.grad_sum is not None
    assert torch.equal(again.grad_sum, stats.grad_sum)
    assert (again.num_micro_batches, again.num_nonfinite) == (9, 2)


@pytest.mark.parametrize(("method", "ratio"), [("piece-f", 0.1), ("piece-s", 0.1), ("piece-s", 0.5)])
def test_another_ratio_or_method_needs_no_second_pass(tmp_path: Path, method: str, ratio: float) -> None:
    stats = make_stats()
    save_statistics(tmp_path, stats)
    again = load_statistics(tmp_path, LAYOUT, needs_sum=method == "piece-s")
    first, second = select(LAYOUT, method, ratio, stats), select(LAYOUT, method, ratio, again)
    assert first.index.keys() == second.index.keys()
    assert all(torch.equal(index, second.index[name]) for name, index in first.index.items())


def test_the_newest_sums_are_those_of_most_micro_batches(tmp_path: Path) -> None:
    """A kill between writing new sums and removing older ones leaves both."""
    folder, older = tmp_path / "partial", tmp_path / "older"
    for num_done in (9, 10):
        stats = make_stats()
        stats.num_micro_batches = num_done
        PartialStatistics(folder, 1, SOURCE).keep(stats)
        if num_done == 9:
            shutil.copytree(folder, older)
    assert len(list(folder.iterdir())) == 1  # the older ones are gone
    shutil.copytree(older, folder, dirs_exist_ok=True)
    found = empty_stats(LAYOUT, True, "cpu")
    PartialStatistics(folder, 1, SOURCE).begin(found)
    assert found.num_micro_batches == 10


def test_no_temporary_file_is_left(tmp_path: Path) -> None:
    save_statistics(tmp_path, make_stats())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["statistics-00000-of-00001.safetensors", "statistics.json"]


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    save_statistics(tmp_path, make_stats())
    (tmp_path / "statistics.json").unlink()  # written last
    with pytest.raises(UserError, match="no statistics in"):
        load_statistics(tmp_path, LAYOUT, needs_sum=True)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    save_statistics(tmp_path, make_stats())
    with pytest.raises(UserError, match="of another model"):
        load_statistics(tmp_path, layout_of(nn.Linear(7, 3)), needs_sum=True)


def test_a_missing_sum_is_refused_only_where_it_is_needed(tmp_path: Path) -> None:
    save_statistics(tmp_path, make_stats(with_sum=False))
    assert load_statistics(tmp_path, LAYOUT, needs_sum=False).grad_sum is None
    with pytest.raises(UserError, match="only sums of squares"):
        load_statistics(tmp_path, LAYOUT, needs_sum=True)


def test_statistics_of_other_data_are_refused(tmp_path: Path) -> None:
    save_statistics(tmp_path, make_stats(), SOURCE)
    with pytest.raises(UserError, match=r"of .'batch': 4.*not of .'batch': 8"):
        load_statistics(tmp_path, LAYOUT, needs_sum=True, source={**SOURCE, "batch": 8})


def test_statistics_of_other_weights_rows_or_batches_are_refused_or_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another revision of the model has the same names and shapes, and other rows may have the same number."""
    passes: list[int] = []

    def collect(
        engine: Any, batches: MicroBatches, needs_sum: bool, device: Any, layout: Layout, *, keeper: Any
    ) -> GradientStats:
        assert (needs_sum, device, keeper) == (True, None, None)  # any method can use them
        passes.append(len(passes))
        stats = empty_stats(layout, needs_sum, "cpu")
        stats.square_sum.fill_(float(len(passes)))
        return stats

    monkeypatch.setattr(mask_source, "collect_statistics", collect)
    flags = MethodArguments(statistics_file=str(tmp_path))
    first = mask_source.MaskSource(config=flags.config(), files=flags, task="t")
    later = replace(first, is_first=False)
    torch.manual_seed(0)
    base, revision = (SimpleNamespace(module=nn.Linear(4, 3), device="cpu") for _ in range(2))

    def rows(last: int, label: int = 1) -> datasets.Dataset:
        return datasets.Dataset.from_dict({"input_ids": [[1, 2], [1, last]], "labels": [[1, 2], [1, label]]})

    def take(source: mask_source.MaskSource, engine: Any, data: datasets.Dataset, batch_size: int = 2) -> float:
        batches = MicroBatches(data, lambda found: found, batch_size)
        stats = source._kept_statistics(engine, batches, layout_of(engine.module), None)
        assert stats is not None
        return float(stats.square_sum[0])

    assert take(first, base, rows(3)) == take(first, base, rows(3)) == take(later, base, rows(3)) == 1.0
    for engine, data, batch_size, what in (
        (revision, rows(3), 2, "weights"),
        (base, rows(4), 2, "text"),
        (base, rows(3, 7), 2, "text"),
        (base, rows(3), 1, "batch_size"),
    ):
        with pytest.raises(UserError, match=f"were taken of .'{what}'.*use another folder"):
            take(first, engine, data, batch_size)
    assert len(passes) == 1

    # A later task's weights are what the run has led to; statistics of an earlier version name none.
    assert take(later, revision, rows(3)) == take(first, revision, rows(3)) == 2.0
    assert "they are taken again" in caplog.text
    index = json.loads((tmp_path / "t" / "statistics.json").read_text())
    del index["source"]["weights"]
    (tmp_path / "t" / "statistics.json").write_text(json.dumps(index))
    assert take(first, revision, rows(3)) == 3.0


def test_sums_are_saved_at_every_interval_and_the_newest_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 saves only when a signal asks the run to end."""
    for rounds, due in ((0, ""), (1, "1234567"), (2, "246"), (3, "36"), (8, "")):
        keeper = PartialStatistics(tmp_path, rounds, SOURCE)
        assert "".join(str(number) for number in range(1, 8) if keeper.is_due(number)) == due, rounds
    monkeypatch.setattr(statistics_file, "stop_asked", lambda: True)
    assert PartialStatistics(tmp_path, 0, SOURCE).is_due(1)

    # Older sums go once newer ones are complete; what is incomplete does not count.
    keeper, stats = PartialStatistics(tmp_path / "sums", 1, SOURCE), make_stats()
    for count in (9, 10):
        keeper.keep(replace(stats, num_micro_batches=count))
        assert [path.name for path in (tmp_path / "sums").iterdir()] == [f"{count:09d}"]
    (tmp_path / "sums" / "000000011").mkdir()
    begun = empty_stats(LAYOUT, True, "cpu")
    keeper.begin(begun)
    assert begun.num_micro_batches == 10
    assert torch.equal(begun.square_sum, stats.square_sum)
