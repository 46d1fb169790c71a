"""Estimators: what each needs, and that a score depends on the element alone, not on where a rank's range begins."""

import numpy as np
import pytest
import torch

from piece_ds.methods.registry import METHODS, find_estimator
from piece_ds.selection.estimators import Fragment

N = 1009
ESTIMATORS = [name for name, method in METHODS.items() if method.estimator is not None]


def fragment(start: int, stop: int, **changes: object) -> Fragment:
    generator = torch.Generator().manual_seed(0)
    sums, weights = torch.randn(2, N, generator=generator)
    fields = {
        "parameter_index": 4,
        "start": start,
        "numel": stop - start,
        "device": torch.device("cpu"),
        "square_sum": (sums.square() * 3)[start:stop],
        "grad_sum": sums[start:stop],
        "weight": lambda: weights[start:stop].clone(),
        "lam": 0.5,
        "seed": 8,
    }
    return Fragment(**(fields | changes))


@pytest.mark.parametrize("method", ESTIMATORS)
@pytest.mark.parametrize("border", [1, 7, 504, 1008])
def test_scores_do_not_depend_on_where_a_range_begins(method: str, border: int) -> None:
    score = find_estimator(method).score
    parts = torch.cat([score(fragment(0, border)), score(fragment(border, N))])
    assert torch.equal(parts, score(fragment(0, N)))


@pytest.mark.parametrize("method", ESTIMATORS)
def test_scores_are_fp32_not_negative_and_not_nan(method: str) -> None:
    infinite = torch.full((N,), float("inf"))
    nan = torch.full((N,), float("nan"))
    for changes in (
        {},
        {"square_sum": infinite, "grad_sum": -infinite},
        {"weight": lambda: nan},
        {"weight": lambda: -infinite},
    ):
        score = find_estimator(method).score(fragment(0, N, **changes))
        assert score.dtype == torch.float32
        assert score.shape == (N,)
        assert not bool(score.isnan().any() | score.signbit().any())


@pytest.mark.parametrize("method", ESTIMATORS)
def test_scoring_changes_no_statistic(method: str) -> None:
    one = fragment(0, N)
    find_estimator(method).score(one)
    assert torch.equal(one.square_sum, fragment(0, N).square_sum)
    assert torch.equal(one.grad_sum, fragment(0, N).grad_sum)


@pytest.mark.parametrize(
    ("method", "needs"),
    [("piece-f", "squares"), ("piece-s", "sum and squares"), ("random", "nothing"), ("magnitude", "nothing")],
)
def test_every_method_states_what_it_needs(method: str, needs: str) -> None:
    assert find_estimator(method).needs == METHODS[method].needs == needs
    assert METHODS[method].source
    nothing = {"square_sum": None, "grad_sum": None}
    kept = {
        key: getattr(fragment(0, N), key)
        for key, needed in (("square_sum", "squares" in needs), ("grad_sum", "sum" in needs))
        if needed
    }
    find_estimator(method).score(fragment(0, N, **(nothing | kept)))


def test_gradient_scores_equal_numpy() -> None:
    one = fragment(0, N)
    sums, squares = one.grad_sum.numpy(), one.square_sum.numpy()
    np.testing.assert_array_equal(find_estimator("piece-f").score(one).numpy(), squares)
    want = np.abs(sums) / np.sqrt(squares + np.float32(0.5))
    np.testing.assert_array_equal(find_estimator("piece-s").score(one).numpy(), want)
    weights = one.weight().numpy()
    assert (weights < 0).any()
    np.testing.assert_array_equal(find_estimator("magnitude").score(one).numpy(), np.abs(weights))


def test_random_scores_equal_splitmix64_in_whole_numbers() -> None:
    """The generator written again with Python's unbounded integers."""

    def splitmix(x: int) -> int:
        bits = (1 << 64) - 1
        x = (x + 0x9E3779B97F4A7C15) & bits
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & bits
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & bits
        return x ^ (x >> 31)

    def signed(x: int) -> int:
        return x - (1 << 64) if x >> 63 else x

    stream = splitmix(8 * 1_000_003 + 4)
    want = [signed(splitmix(i ^ stream)) % 0x7F800000 for i in range(N)]
    assert find_estimator("random").score(fragment(0, N)).view(torch.int32).tolist() == want
