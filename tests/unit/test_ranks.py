"""Selection, statistics files and their resharding over two and three owners, as forks of this process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracle import score
from support.ranks import on_ranks
from support.selection_cases import CASES, Blocks, as_set, blocks_layout, expected, make_stats, whole_sums

from piece_ds.checkpoint.delta_file import load_previous, save_delta
from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.selection import candidates
from piece_ds.selection.candidates import LastPassFilter
from piece_ds.selection.estimators import PIECE_S
from piece_ds.zero.weights import read_selected

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_selection_over_ranks_equals_a_stable_sort(num_ranks: int) -> None:
    cases = CASES if num_ranks == 2 else CASES[1::5]  # 5 has no factor in common with the cases' periods

    def work() -> list[set[tuple[str, int]]]:
        masks = [select(blocks_layout(), m, ratio, make_stats(kind), budget=budget) for kind, m, budget, ratio in cases]
        wholes = [mask.whole() for mask in masks]
        assert all(bool((index.diff() > 0).all()) for whole in wholes for index in whole.values())  # rank after rank
        return [as_set(whole) for whole in wholes]

    first, *others = on_ranks(num_ranks, work)
    for case, mask in zip(cases, first, strict=True):
        assert mask == expected(*case), case
    assert all(found == first for found in others)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_candidates_of_a_last_pass_are_taken_only_if_they_are_proven(num_ranks: int) -> None:
    """A bound that the last gradients made too high finds too few, or one rank has no room for what it found.

    The selection must not be made of them. k counts the whole model, also where fewer elements are eligible.
    """
    k = max(1, int(0.3 * blocks_layout().total))
    scores = np.sort(np.concatenate([*score("piece-s", *whole_sums("random")).values()]))[::-1]
    # (bound, room on the first rank; None: enough, are they proven)
    cases = [
        (1e-6, None, True),
        (float(scores[k - 1]), None, True),
        (float(scores[k - 2]), None, False),
        (1e30, None, False),
        (1e-6, 5, False),
    ]

    def work() -> list[tuple[bool, set[tuple[str, int]]]]:
        found = []
        for bound, room, _ in cases:
            stats = make_stats("random")
            last = LastPassFilter(stats.layout, PIECE_S, 0.3, lam=1.0)
            last.bound = bound
            room = room if room is not None and stats.layout.rank == 0 else stats.layout.num_owned
            last.candidates = candidates.ops.empty_candidates(room, "cpu")
            nothing, bad = torch.zeros(1), torch.zeros((), dtype=torch.int64)
            for place in range(stats.layout.num_owned):  # the last gradient is zero: the sums stay as they are
                sums = stats.fragment(place, 1)
                last.accumulate_(nothing, *sums, 1.0, bad, place)
            proven = last.proven()
            mask = select(stats.layout, "piece-s", 0.3, stats, candidates=proven)
            found.append((proven is not None, as_set(mask.whole())))
        return found

    for found in on_ranks(num_ranks, work):
        assert [proven for proven, _ in found] == [is_proven for _, _, is_proven in cases]
        for _, mask in found:
            assert mask == expected("random", "piece-s", "model", 0.3)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_statistics_of_other_ranks_come_back_bit_for_bit(tmp_path: Path, before: int, after: int) -> None:
    on_ranks(before, lambda: save_statistics(tmp_path, make_stats("random"), {"of": "a test"}))

    def work() -> bool:
        want = make_stats("random")
        got = load_statistics(tmp_path, want.layout, needs_sum=True, source={"of": "a test"})
        assert got.grad_sum is not None
        assert want.grad_sum is not None
        same = [(got.square_sum, want.square_sum), (got.grad_sum, want.grad_sum)]
        return all(np.array_equal(a.numpy().view(np.int32), b.numpy().view(np.int32)) for a, b in same)

    assert all(on_ranks(after, work))


def test_each_rank_reads_its_own_part_of_what_a_task_began_with(tmp_path: Path) -> None:
    """A resumed run takes the previous values from the file, on any number of ranks."""

    def work() -> list[bool]:
        model = Blocks()
        with torch.no_grad():
            for number, param in enumerate(model.parameters()):
                param.copy_(torch.arange(param.numel()).view_as(param) + 1000.0 * number)
        mask = select(layout_of(model), "random", 0.3)
        previous = read_selected(model, mask)
        save_delta(tmp_path / "previous.safetensors", model, mask, previous)
        found = load_previous(tmp_path / "previous.safetensors", mask)
        return [found.keys() == previous.keys(), *(torch.equal(found[name], previous[name]) for name in previous)]

    for num_ranks in (2, 3):
        assert all(all(same) for same in on_ranks(num_ranks, work))
