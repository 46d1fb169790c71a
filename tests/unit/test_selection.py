"""Selection in one process equals a stable sort, whatever the scores; the data-free methods do what they say."""

import itertools

import numpy as np
import pytest
import torch
from support.host_waits import HostWaits
from support.selection_cases import (
    BUDGETS,
    CASES,
    KINDS,
    METHODS,
    NOT_ELIGIBLE,
    RATIOS,
    Blocks,
    as_set,
    blocks_layout,
    expected,
    make_stats,
)
from support.tables import each
from torch import nn

from piece_ds import ops
from piece_ds.methods.estimate import select
from piece_ds.methods.registry import find_estimator
from piece_ds.models.layout import layout_of
from piece_ds.ops.scores import Candidates, score
from piece_ds.runtime.errors import UserError
from piece_ds.selection import alone, candidates, top_k
from piece_ds.selection import scores as runs
from piece_ds.selection.alone import first_in_order
from piece_ds.selection.budget import num_to_select
from piece_ds.state.partition import Layout, ParameterInfo
from piece_ds.state.statistics import GradientStats

NUM_ELEMENTS = sum(p.numel() for p in Blocks().parameters())
NUM_ELIGIBLE = sum(p.numel() for n, p in Blocks().named_parameters() if n not in NOT_ELIGIBLE)


@each(kind=KINDS, method=METHODS, budget=BUDGETS, ratio=RATIOS)
def test_selection_equals_a_stable_sort(kind: str, method: str, budget: str, ratio: float) -> None:
    mask = select(blocks_layout(), method, ratio, make_stats(kind), budget=budget)
    want = expected(kind, method, budget, ratio)
    assert as_set(mask.whole()) == want
    assert mask.num_selected == len(want)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank decides on its device, which here is the CPU."""
    monkeypatch.setattr(top_k, "decides_alone", lambda layout, device: layout.num_ranks == 1)


def test_a_device_that_decides_alone_selects_the_same(as_on_a_gpu: None) -> None:
    for kind, method, budget, ratio in CASES:
        mask = select(blocks_layout(), method, ratio, make_stats(kind), budget=budget)
        assert as_set(mask.whole()) == expected(kind, method, budget, ratio), (kind, method, budget, ratio)
        assert all(bool((index.diff() > 0).all()) for index in mask.index.values())


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_methods_without_sums_select_the_same_alone_on_a_device(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, method: str, budget: str
) -> None:
    got = select(blocks_layout(), method, 0.3, weight_of=few_values, budget=budget)
    monkeypatch.undo()
    want = select(blocks_layout(), method, 0.3, weight_of=few_values, budget=budget)
    assert as_set(got.whole()) == as_set(want.whole())


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_host_waits_for_a_device_two_times_and_for_the_positions(as_on_a_gpu: None, budget: str) -> None:
    """The bound, the number of candidates; with several groups their digits instead of a bound, read at once."""
    stats, layout = make_stats("random"), blocks_layout()
    with HostWaits() as waits:
        select(layout, "piece-s", 0.3, stats, budget=budget)
    assert len(waits.places) <= 3, waits.places
    with HostWaits() as waits:
        select(layout, "piece-s", 0.3, stats, candidates=everything_of(stats), budget="model")
    assert len(waits.places) <= 1, waits.places


def test_waits_are_counted() -> None:
    x = torch.arange(4.0)
    ways = {
        "item": lambda: x[0].item(),
        "number": lambda: int(x[1]),
        "truth": lambda: bool((x > 0).all()),
        "list": lambda: x.tolist(),
        "copy": lambda: x.cpu(),
        "blocking move": lambda: x.to("cpu"),
        "made there": lambda: torch.tensor([1], device="cpu"),
        "unknown length": lambda: x.nonzero(),
        "boolean index": lambda: x[x > 1],
        "op": lambda: ops.mask_to_index(torch.ones(1, dtype=torch.uint8)),
    }
    for name, way in ways.items():
        with HostWaits() as waits:
            way()
        assert len(waits.places) == 1, (name, waits.places)
    with HostWaits() as waits:
        x.to("cpu", non_blocking=True).sort().values[:2].cumsum(0)
    assert not waits.places


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_chunk_borders_change_nothing(monkeypatch: pytest.MonkeyPatch, method: str, budget: str) -> None:
    want = select(blocks_layout(), method, 0.3, weight_of=few_values, budget=budget)
    monkeypatch.setattr(runs, "CHUNK", 3)
    got = select(blocks_layout(), method, 0.3, weight_of=few_values, budget=budget)
    assert as_set(got.whole()) == as_set(want.whole())


@pytest.mark.parametrize("room", [0, 1, 5])
def test_too_little_room_for_candidates_changes_nothing(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(candidates, "room_for", lambda k, num_owned: room)
    for kind, method, budget, ratio in CASES:
        mask = select(blocks_layout(), method, ratio, make_stats(kind), budget=budget)
        assert as_set(mask.whole()) == expected(kind, method, budget, ratio), (kind, method, budget, ratio)


@pytest.mark.parametrize("bound", [0.0, 1e30, float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_bound_changes_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, bound: float) -> None:
    monkeypatch.setattr(candidates, "sampled_bound", lambda *_: bound)
    mask = select(blocks_layout(), "piece-s", 0.01, make_stats(kind))
    assert as_set(mask.whole()) == expected(kind, "piece-s", "model", 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_changes_nothing(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    for name, value in (("SAMPLE_FROM", 1), ("SAMPLE_RUN", 2), ("SAMPLE_STRIDE", 5)):
        monkeypatch.setattr(candidates, name, value)
    mask = select(blocks_layout(), "piece-s", 0.3, make_stats(kind))
    assert as_set(mask.whole()) == expected(kind, "piece-s", "model", 0.3)


def everything_of(stats: GradientStats, order: torch.Tensor | None = None) -> Candidates:
    """Every element as a candidate, in the order given."""
    order = torch.arange(NUM_ELIGIBLE) if order is None else order
    return Candidates(score(stats.grad_sum, stats.square_sum)[order], order, torch.tensor([NUM_ELIGIBLE]))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_candidates_that_contain_the_selection_are_enough(kind: str, shuffled: bool) -> None:
    stats = make_stats(kind)
    order = torch.randperm(NUM_ELIGIBLE) if shuffled else torch.arange(NUM_ELIGIBLE)
    mask = select(blocks_layout(), "piece-s", 0.3, stats, candidates=everything_of(stats, order))
    assert as_set(mask.whole()) == expected(kind, "piece-s", "model", 0.3)


@pytest.mark.parametrize("num_elements", [1, 7, 8, 33, 1023, 100_003])
def test_exactly_k_of_n_at_every_k_that_hurts(num_elements: int) -> None:
    layer = nn.Linear(num_elements, 1, bias=False)
    squares = torch.rand(num_elements, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    order = np.argsort(-squares.numpy(), kind="stable")
    stats = GradientStats(layout_of(layer), squares, None)
    for k in sorted({1, 2, num_elements // 2, num_elements - 1, num_elements} - {0}):
        if k <= num_elements:
            mask = select(stats.layout, "piece-f", min(1.0, (k + 0.5) / num_elements), stats)
            assert mask.index["weight"].tolist() == sorted(order[:k].tolist())


def test_budget_is_floor_of_ratio_times_all_elements_and_at_least_one() -> None:
    assert num_to_select(0.001, 999) == 1
    assert num_to_select(0.001, 29_385) == 29
    assert num_to_select(0.5, 7) == 3
    assert num_to_select(1.0, 10**12) == 10**12


@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_ratio_one_selects_all_eligible_elements_and_never_the_embeddings(method: str) -> None:
    mask = select(blocks_layout(), method, 1.0, weight_of=zeros)
    assert mask.num_selected == NUM_ELIGIBLE < NUM_ELEMENTS
    assert not set(NOT_ELIGIBLE) & set(mask.index)


def test_embeddings_count_in_k() -> None:
    mask = select(blocks_layout(), "random", 0.1)
    assert mask.num_selected == int(0.1 * NUM_ELEMENTS) != int(0.1 * NUM_ELIGIBLE)


def test_tied_embeddings_are_one_parameter_and_not_eligible() -> None:
    model = Blocks()
    model.tied = nn.Linear(7, 13, bias=False)
    model.tied.weight = model.embed.weight
    layout = layout_of(model)
    assert layout.total == NUM_ELEMENTS
    assert layout.num_eligible == NUM_ELIGIBLE


def test_magnitude_selects_the_largest_absolute_weights() -> None:
    weights = torch.randn(1009, generator=torch.Generator().manual_seed(1))
    weights[5] = float("nan")
    layer = nn.Linear(1009, 1, bias=False)
    mask = select(layout_of(layer), "magnitude", 0.05, weight_of=lambda _, start, numel: weights[start : start + numel])
    order = np.argsort(-np.nan_to_num(np.abs(weights.numpy())), kind="stable")
    assert mask.index["weight"].tolist() == sorted(order[:50].tolist())


def test_random_selection_repeats_for_a_seed_and_differs_between_seeds() -> None:
    first, again, other = (as_set(select(blocks_layout(), "random", 0.3, seed=s).whole()) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_random_selection_is_uniform() -> None:
    """Chi-squared over 100 equal runs of positions; the 0.1 % point for 99 degrees of freedom is 148."""
    layer = nn.Linear(1000, 200)
    mask = select(layout_of(layer), "random", 0.1, seed=7)
    counts = np.bincount(mask.index["weight"].numpy() // 2000, minlength=100)
    mean = counts.mean()
    assert ((counts - mean) ** 2 / mean).sum() < 148
    # A parameter of 0.5 % of the elements gets about its share: 20 of 20 000, standard deviation 4.2.
    assert 3 <= mask.index["bias"].numel() <= 40


def test_random_parameters_of_one_shape_get_different_positions() -> None:
    model = nn.ModuleList([nn.Linear(100, 100, bias=False) for _ in range(2)])
    mask = select(layout_of(model), "random", 0.1)
    shared = set(mask.index["0.weight"].tolist()) & set(mask.index["1.weight"].tolist())
    assert len(shared) < 200  # 1000 each; 100 by chance


@pytest.mark.parametrize("budget", BUDGETS)
def test_index_lists_are_ascending_int64(budget: str) -> None:
    mask = select(blocks_layout(), "piece-f", 0.3, make_stats("random"), budget=budget)
    for index in mask.index.values():
        assert index.dtype == torch.int64
        assert bool((index.diff() > 0).all())


def test_lambda_changes_the_second_order_score() -> None:
    layer = nn.Linear(2, 1, bias=False)
    stats = GradientStats(layout_of(layer), torch.tensor([1e-4, 100.0]), torch.tensor([1e-2, 9.0]))
    assert select(stats.layout, "piece-s", 0.5, stats, importance_lambda=1.0).index["weight"].tolist() == [1]
    assert select(stats.layout, "piece-s", 0.5, stats, importance_lambda=1e-6).index["weight"].tolist() == [0]


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"piece-z.*Did you mean 'piece-"):
        find_estimator("piece-z")


def test_missing_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="needs gradient statistics"):
        select(blocks_layout(), "piece-f", 0.1)
    only_squares = GradientStats(blocks_layout(), torch.ones(NUM_ELIGIBLE), None)
    with pytest.raises(ValueError, match="sum and square sum"):
        select(blocks_layout(), "piece-s", 0.1, only_squares)


def test_missing_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="pass weight_of"):
        select(blocks_layout(), "magnitude", 0.1)


def test_a_model_without_eligible_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="no eligible parameter"):
        select(layout_of(nn.Linear(2, 2).requires_grad_(False)), "random", 0.1)


def few_values(name: str, start: int, numel: int) -> torch.Tensor:
    """Weights with many ties, the same wherever a range begins."""
    return (torch.arange(start, start + numel) * 7919 % 5 - 2).float()


def zeros(name: str, start: int, numel: int) -> torch.Tensor:
    return torch.zeros(numel)


def test_candidates_in_any_order_are_taken_as_in_order() -> None:
    """A GPU appends them as its threads come: ties still go to the smaller position."""
    layout = blocks_layout()
    score = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, 2.0])
    index = torch.tensor([40, 3, 17, 9, 90, 4])
    for order in itertools.permutations(range(6)):
        shuffled = Candidates(score[list(order)], index[list(order)], torch.tensor([6]))
        found = first_in_order(shuffled, layout, {info.name: 0 for info in layout.eligible()}, [4])
        assert found.tolist() == [3, 4, 9, 40]


def test_one_sort_by_score_and_position_takes_what_two_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties, zeros, infinity, NaN of both signs, and positions up to the largest that fits."""
    generator = torch.Generator().manual_seed(3)
    last = (1 << 32) - 1
    layout = Layout((ParameterInfo("weight", (1 << 32,), 1 << 32, True),), 0, 1)
    for _ in range(20):
        score = torch.randint(0, 4, (50,), generator=generator).float() / 3
        score[:4] = torch.tensor([float("inf"), 1e-45, 3.4e38, float("nan")])
        index = torch.randint(0, last, (50,), generator=generator).unique()
        index = torch.cat([index[: score.numel() - 1], torch.tensor([last])])[torch.randperm(50, generator=generator)]
        found = Candidates(score, index, torch.tensor([50]))
        for k in (1, 7, 30, 50):
            monkeypatch.setattr(alone, "_MAX_PACKED", 1 << 32)
            once = first_in_order(found, layout, {"weight": 0}, [k])
            monkeypatch.setattr(alone, "_MAX_PACKED", 0)
            assert torch.equal(once, first_in_order(found, layout, {"weight": 0}, [k])), k
