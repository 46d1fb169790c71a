"""Every element of a parameter has exactly one owner, and the order of ranks is the order of positions."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn

from piece_ds.models.layout import layout_of
from piece_ds.state.mask import Mask
from piece_ds.state.partition import index_dtype, partition_of
from piece_ds.state.statistics import empty_stats
from piece_ds.zero.adapter import Piece, pieces_between, positions_in
from piece_ds.zero.exchange import plan_buckets, slice_range


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("numel", [0, 1, 2, 7, 8, 9, 31, 1023, 10_007])
def test_ranges_cover_a_parameter_once_in_order(numel: int, num_ranks: int) -> None:
    parts = [partition_of(numel, owner, num_ranks) for owner in range(num_ranks)]
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(numel))
    chunk = -(-numel // num_ranks)
    assert all(part.numel in (chunk, 0) or part.stop == numel for part in parts)


def test_layout_of_one_process_owns_every_eligible_element() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1).requires_grad_(False))
    layout = layout_of(model)
    assert (layout.rank, layout.num_ranks) == (0, 1)
    assert (layout.total, layout.num_eligible, layout.num_owned) == (26, 20, 20)
    assert [(info.name, part.numel, offset) for info, part, offset in layout.owned()] == [
        ("0.weight", 15, 0),
        ("0.bias", 5, 15),
    ]
    assert layout.shapes()["1.weight"] == (1, 5)


@pytest.mark.parametrize(("needs_sum", "num_buffers"), [(False, 1), (True, 2)])
def test_statistics_take_four_bytes_per_owned_element_and_sum(needs_sum: bool, num_buffers: int) -> None:
    stats = empty_stats(layout_of(nn.Linear(10, 10)), needs_sum, "cpu")
    buffers = [tensor for tensor in (stats.square_sum, stats.grad_sum) if tensor is not None]
    assert len(buffers) == num_buffers
    assert all(tensor.nbytes == 4 * 110 for tensor in buffers)


@pytest.mark.parametrize("bucket_elements", [1, 2, 7, 50, 1000])
def test_buckets_hold_every_element_once_and_stay_small(bucket_elements: int) -> None:
    layout = layout_of(nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 1), nn.Linear(1, 23)))
    buckets = plan_buckets(layout, bucket_elements)
    seen = [(part.info.name, i) for bucket in buckets for part in bucket for i in range(*slice_range(part, 0, 1))]
    assert len(seen) == len(set(seen)) == layout.num_eligible

    # Also where the last ranks own fewer elements or none, and where only some rows are eligible.
    first, *others = layout.parameters
    rows = replace(layout, parameters=(replace(first, rows=(2, 5)), *others))
    for cut, num_ranks in product((layout, rows), (2, 3, 5)):
        seen = []
        for bucket in plan_buckets(replace(cut, num_ranks=num_ranks), bucket_elements):
            ranges = [(part, *slice_range(part, owner, num_ranks)) for part in bucket for owner in range(num_ranks)]
            assert all(start <= stop for _, start, stop in ranges)
            assert sum(stop - start for _, start, stop in ranges) <= max(bucket_elements, num_ranks)
            seen += [(part.info.name, i) for part, start, stop in ranges for i in range(start, stop)]
        assert len(seen) == len(set(seen)) == cut.num_eligible
    assert all(sum(part.numel for part in bucket) <= bucket_elements for bucket in buckets)
    order = [part.info.name for bucket in buckets for part in bucket]
    assert order[0] == "2.bias"  # backward finishes the last parameter first
    assert [name for name, part in zip(order, (p for b in buckets for p in b), strict=True) if part.last] == [
        info.name for info in reversed(layout.eligible())
    ]


PIECES = [Piece("a", 0, 4, 0), Piece("b", 10, 5, 6), Piece("a", 4, 2, 11)]  # [4, 6) of the buffer is padding


def test_positions_in_a_flat_buffer() -> None:
    index = {"a": torch.tensor([1, 3, 5]), "b": torch.tensor([0, 10, 14, 15])}
    assert positions_in(PIECES, index).tolist() == [1, 3, 6, 10, 12]


@pytest.mark.parametrize("begin", range(13))
@pytest.mark.parametrize("length", [1, 3, 13])
def test_cut_keeps_the_elements_inside(begin: int, length: int) -> None:
    def elements(pieces: list[Piece]) -> dict[int, tuple[str, int]]:
        return {p.offset + i: (p.name, p.start + i) for p in pieces for i in range(p.numel)}

    want = {o - begin: e for o, e in elements(PIECES).items() if begin <= o < begin + length}
    assert elements(pieces_between(PIECES, begin, begin + length)) == want


def test_whole_mask_of_one_process_is_its_index() -> None:
    mask = Mask(layout_of(nn.Linear(3, 2)), {"bias": torch.tensor([1]), "weight": torch.zeros(0).long()}, 1)
    assert {name: index.tolist() for name, index in mask.whole().items()} == {"bias": [1]}


def test_positions_take_eight_bytes_from_where_four_cannot_count_them() -> None:
    assert [index_dtype(numel) for numel in (0, 2**31 - 1, 2**31, 2**33)] == [torch.int32] * 2 + [torch.int64] * 2
