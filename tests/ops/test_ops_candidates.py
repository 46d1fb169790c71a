"""filter_, accumulate_filter_, select_above and sampled histograms equal numpy, bit for bit, for every provider."""

import numpy as np
import pytest
import torch
from support.op_cases import BLOCK, DTYPES, F32, accumulated, assert_same_bits, scores, sums, values
from support.tables import each
from torch import Tensor

from piece_ds import ops

pytestmark = pytest.mark.usefixtures("cpu_provider")

SIZES = [0, 1, 7, 31, 32, 33, 65, 1009, BLOCK - 1, BLOCK + 77]
OFFSET = 3 << 40  # positions are 64 bits wide
BOUNDS = [0.0, -1.0, float("nan"), 1e-45, 1e-40, 1e-38, 3e-38, 1e-20, 0.5, 1.0, 7.7, 1e19, 1.9e19, 3.4e38, float("inf")]


def check_candidates(found: ops.Candidates, want: np.ndarray, bound: float) -> None:
    above = np.flatnonzero(want >= F32(bound))
    assert found.count() == above.size
    order = found.index[: above.size].argsort()
    assert_same_bits(found.index[order], above + OFFSET)
    assert_same_bits(found.score[order], want[above])


@each(n=SIZES, with_sum=[True, False])
def test_filter_finds_exactly_what_reaches_the_bound(n: int, with_sum: bool) -> None:
    grad_sum, square_sum = sums(n, seed=10)
    optional = grad_sum if with_sum else None
    for bound in BOUNDS:
        found = ops.empty_candidates(n, "cpu")
        ops.filter_(optional, square_sum, 1.0, bound, OFFSET, found)
        check_candidates(found, scores(optional, square_sum), bound)


@each(lam=[1e-45, 1e-30, 1.0, 1e20])
def test_no_score_at_the_bound_is_lost_and_none_below_it_is_found(lam: float) -> None:
    """The bound is one of the scores, or the next number above or below: a test without division must not round it."""
    rng = np.random.default_rng(1)
    grad_sum = torch.from_numpy((rng.standard_normal(1009) * 10.0 ** rng.uniform(-30, 15, 1009)).astype(F32))
    square_sum = torch.from_numpy((10.0 ** rng.uniform(-45, 30, 1009)).astype(F32))
    want = scores(grad_sum, square_sum, lam)
    for bound in want[::13]:
        for near in (np.nextafter(bound, F32(0)), bound, np.nextafter(bound, F32(np.inf))):
            found = ops.empty_candidates(1009, "cpu")
            ops.filter_(grad_sum, square_sum, lam, float(near), OFFSET, found)
            check_candidates(found, want, near)


@each(capacity=[0, 1, 500, BLOCK + 1])
def test_filter_counts_what_has_no_room_and_writes_nothing_past_it(capacity: int) -> None:
    n = 2 * BLOCK + 5
    room = ops.empty_candidates(capacity + 8, "cpu")
    room.score.fill_(-7.0)
    room.index.fill_(-7)
    found = ops.Candidates(room.score[:capacity], room.index[:capacity], room.num_found)
    score = values(n, seed=12).abs().nan_to_num(0.0)
    for _ in range(2):  # the second call finds its room taken
        ops.filter_(None, score, 1.0, 0.0, 0, found)
    assert found.count() == 2 * n
    assert room.score[capacity:].eq(-7.0).all()
    assert room.index[capacity:].eq(-7).all()
    assert_same_bits(found.score, score.numpy()[found.index.numpy()])
    assert found.index.unique().numel() == capacity


def test_filter_appends_after_what_is_there() -> None:
    found = ops.empty_candidates(4, "cpu")
    ops.filter_(None, torch.tensor([1.0, 5.0]), 1.0, 2.0, 10, found)
    ops.filter_(None, torch.tensor([3.0, 1.0, 4.0]), 1.0, 2.0, 20, found)
    assert found.index[:3].tolist() == [11, 20, 22]
    assert found.score[:3].tolist() == [5.0, 3.0, 4.0]


@each(n=SIZES, dtype=DTYPES, with_sum=[True, False])
def test_accumulate_filter_filters_the_new_sums(n: int, dtype: torch.dtype, with_sum: bool) -> None:
    start_sum, start_square = (values(n, seed=seed).nan_to_num(1.0, 1.0, 1.0).abs() for seed in (1, 2))
    grad = values(n + 1, dtype)[1:]
    g, squares, num_nonfinite = accumulated(grad, 0.3)
    for bound in [0.0, 1e-40, 1e-3, 1.0, 1e30]:
        grad_sum, square_sum = start_sum.clone(), start_square.clone()
        count, found = torch.tensor([40]), ops.empty_candidates(n, "cpu")
        optional = grad_sum if with_sum else None
        ops.accumulate_filter_(grad, optional, square_sum, 0.3, count, 0.5, bound, OFFSET, found)
        with np.errstate(over="ignore"):
            assert_same_bits(grad_sum, start_sum.numpy() + g if with_sum else start_sum.numpy())
            assert_same_bits(square_sum, start_square.numpy() + squares)
        assert count.item() == 40 + num_nonfinite
        check_candidates(found, scores(optional, square_sum, 0.5), bound)


def selected(score: np.ndarray, k: int) -> tuple[int, int, np.ndarray]:
    """(key, ties to take, positions) of the k highest scores, ties to the smaller position."""
    order = np.argsort(-score.astype(np.float64), kind="stable")[:k]
    last = score[order[-1]]
    return int(last.view(np.int32)), k - int((score > last).sum()), np.sort(order)


def tied(n: int) -> tuple[Tensor, Tensor]:
    grad_sum, square_sum = sums(n, seed=14)
    return grad_sum.bfloat16().float().clamp(-3, 3).round(), square_sum.clamp(0, 2).round()


CASES = {"spread": lambda n: sums(n, seed=13), "tied": tied, "zero": lambda n: (torch.zeros(n), torch.ones(n))}


@each(n=[n for n in SIZES if n], case=CASES, with_sum=[True, False], share=[0.0, 0.001, 0.5, 1.0])
def test_select_above_takes_the_k_highest(n: int, case: str, with_sum: bool, share: float) -> None:
    grad_sum, square_sum = CASES[case](n)
    optional = grad_sum if with_sum else None
    key, num_ties, want = selected(scores(optional, square_sum), max(1, int(n * share)))
    assert_same_bits(ops.select_above(optional, square_sum, 1.0, key, num_ties), want)


@pytest.mark.parametrize(
    ("key", "num_ties", "want"),
    [
        (-1, 0, [0, 1, 2, 3]),
        (0, 0, [1, 2, 3]),
        (0, 1, [0, 1, 2, 3]),
        (0x7F800000, 9, [3]),
        (0x7F800001, 9, []),
        (0x7FFFFFFF, 9, []),
    ],
)
def test_select_above_at_the_ends_of_the_keys(key: int, num_ties: int, want: list[int]) -> None:
    score = torch.tensor([0.0, 1e-45, 1.0, float("inf")])
    assert ops.select_above(None, score, 1.0, key, num_ties).tolist() == want


SAMPLES = [(1, 1), (9, 4), (1, 3), (7, 7), (5, 64), (1000, 4096), (40_000, 100_000)]  # (run, stride)


@each(
    n=[0, 1, 33, 1009, 4 * BLOCK + 5],
    with_sum=[True, False],
    digit=[(20, 11), (15, 16), (8, 16), (31, 0), (23, 0)],
)
def test_sampled_histogram_equals_numpy(n: int, with_sum: bool, digit: tuple[int, int]) -> None:
    shift, bits = digit
    grad_sum, square_sum = sums(n, seed=15)
    optional = grad_sum if with_sum else None
    key = scores(optional, square_sum).view(np.int32).astype(np.int64)
    leading = shift + bits == 31
    prefix = int(key[n // 2] >> (shift + bits)) if n and not leading else 0
    for run, stride in SAMPLES:
        kept = key[np.arange(n) % stride < run]
        kept = kept if leading else kept[kept >> (shift + bits) == prefix]
        want = np.bincount((kept >> shift) & (2**bits - 1), minlength=2**bits).astype(np.int64)
        counts = torch.full((2**bits,), 3)
        ops.score_histogram_(counts, optional, square_sum, 1.0, shift, bits, prefix, run, stride)
        assert_same_bits(counts, want + 3)


def test_a_prefix_that_no_key_has_counts_nothing() -> None:
    counts = torch.zeros(16, dtype=torch.int64)
    for prefix in (-1, 1 << 30):
        ops.score_histogram_(counts, None, torch.arange(100.0), 1.0, 8, 4, prefix)
    assert counts.sum() == 0
