"""Data-free selection and files on two and three ranks give what one process gives."""

from typing import Any

import numpy as np
import pytest
import torch
from support.selection_cases import Blocks, as_set, blocks_layout, expected, make_stats, whole_sums
from support.statistics_results import statistics_result

from piece_ds.checkpoint.mask_file import load_mask
from piece_ds.checkpoint.statistics_file import load_statistics
from piece_ds.methods.estimate import select


@pytest.mark.parametrize("ranks", [2, 3])
def test_random_selection_does_not_depend_on_the_number_of_ranks(job: Any, ranks: int) -> None:
    alone = select(blocks_layout(), "random", 0.3, seed=5)
    assert as_set(statistics_result(job, "selection", ranks)["random"]) == as_set(alone.whole())


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_magnitude_takes_ties_in_order_on_any_number_of_ranks(job: Any, ranks: int) -> None:
    """Every weight is one of four magnitudes; most of the selection is decided by position."""
    total = sum(p.numel() for p in Blocks().parameters())
    names = list(whole_sums("random")[0])
    numel = {name: param.numel() for name, param in Blocks().named_parameters()}
    positions = [(name, i) for name in names for i in range(numel[name])]
    order = np.argsort([-abs(i % 7 - 3.0) for _, i in positions], kind="stable")[: int(0.3 * total)]
    assert as_set(statistics_result(job, "selection", ranks)["magnitude"]) == {positions[i] for i in order}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_mask_file_of_two_ranks_is_read_by_any_number(job: Any, ranks: int) -> None:
    written, read = statistics_result(job, "files", 2), statistics_result(job, "files", ranks)
    assert as_set(read["mask"]) == as_set(written["mask"]) == expected("random", "piece-s", "model", 0.3)
    assert read["num_selected"] == len(as_set(written["mask"]))


@pytest.mark.parametrize("ranks", [1, 3])
def test_statistics_of_two_ranks_are_read_by_any_number_bit_for_bit(job: Any, ranks: int) -> None:
    statistics_result(job, "files", 2)
    got = statistics_result(job, "files", ranks)
    sums, squares = whole_sums("random")
    for name in sums:
        np.testing.assert_array_equal(got["sums"][name], sums[name])
        np.testing.assert_array_equal(got["squares"][name], squares[name])
    assert got["counts"] == (12, 3)


def test_files_of_two_ranks_are_read_without_a_process_group(job: Any) -> None:
    statistics_result(job, "files", 2)
    folder = job.folder("statistics_job", 2)
    assert as_set(load_mask(folder / "mask.safetensors", blocks_layout()).whole()) == expected(
        "random", "piece-s", "model", 0.3
    )
    stats = load_statistics(folder / "statistics", blocks_layout(), needs_sum=True)
    assert torch.equal(stats.square_sum, make_stats("random").square_sum)


def test_no_temporary_file_is_left(job: Any) -> None:
    statistics_result(job, "files", 2)
    folder = job.folder("statistics_job", 2)
    assert not list(folder.rglob("*.tmp"))
    assert sorted(path.name for path in (folder / "statistics").iterdir()) == [
        "statistics-00000-of-00002.safetensors",
        "statistics-00001-of-00002.safetensors",
        "statistics.json",
    ]
