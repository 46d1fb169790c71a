"""Every op equals numpy, bit for bit, at the sizes and values that hurt."""

import numpy as np
import pytest
import torch
from support.op_cases import DTYPES, accumulated, assert_same_bits, positions, scores, values
from support.tables import each

from piece_ds import ops
from piece_ds.ops.reference import CHUNK

pytestmark = pytest.mark.usefixtures("cpu_provider")

SIZES = [0, 1, 7, 8, 9, 31, 32, 33, 1023, 10_007, CHUNK + 5]


@each(n=SIZES, dtype=DTYPES, with_sum=[True, False], finite=[True, False])
def test_accumulate_equals_numpy(n: int, dtype: torch.dtype, with_sum: bool, finite: bool) -> None:
    start_sum, start_square = values(n, seed=1).nan_to_num(1.0, 1.0, 1.0), values(n, seed=2).nan_to_num(1.0, 1.0, 1.0)
    grad = values(n, dtype)
    if finite:  # providers may have a faster way then
        grad.masked_fill_(~grad.isfinite(), 0.5)
    before = grad.clone()
    for scale in [1.0, 1 / 1024, 0.3]:
        grad_sum, square_sum = start_sum.clone(), start_square.clone()
        count = torch.tensor([40])
        ops.accumulate_(grad, grad_sum if with_sum else None, square_sum, scale, count)
        g, squares, num_nonfinite = accumulated(grad, scale)
        with np.errstate(over="ignore"):
            assert_same_bits(grad_sum, start_sum.numpy() + g if with_sum else start_sum.numpy())
            assert_same_bits(square_sum, start_square.numpy() + squares)
        assert count.item() == 40 + num_nonfinite
        assert torch.equal(grad.nan_to_num(7.0), before.nan_to_num(7.0))


@each(place=[0, 500, CHUNK - 1, CHUNK, CHUNK + 4], bad=[float("nan"), float("inf"), -float("inf")])
def test_accumulate_finds_a_single_nonfinite_entry_anywhere(place: int, bad: float) -> None:
    grad = torch.ones(CHUNK + 5)
    grad[place] = bad
    square_sum, count = torch.zeros(CHUNK + 5), torch.zeros(1, dtype=torch.int64)
    ops.accumulate_(grad, None, square_sum, 1.0, count)
    assert count.item() == 1
    assert square_sum[place].item() == 0.0
    assert square_sum.sum().item() == CHUNK + 4


def test_accumulate_squares_in_fp32_what_underflows_in_fp16() -> None:
    square_sum = torch.zeros(1)
    ops.accumulate_(torch.tensor([1e-4], dtype=torch.float16), None, square_sum, 1.0, torch.zeros(1).long())
    assert square_sum.item() == pytest.approx(1e-8, rel=1e-3)


@each(n=SIZES, lam=[1.0, 1e-8, 1e6])
def test_second_order_score_equals_numpy(n: int, lam: float) -> None:
    grad_sum, square_sum = values(n, seed=3), values(n, seed=4).abs().nan_to_num(float("inf"))
    assert_same_bits(ops.score(grad_sum, square_sum, lam), scores(grad_sum, square_sum, lam))


@each(n=SIZES)
def test_fisher_score_is_a_copy_of_the_square_sum(n: int) -> None:
    square_sum = values(n, seed=4).abs()
    got = ops.score(None, square_sum)
    assert_same_bits(got, scores(None, square_sum))
    assert n == 0 or got.data_ptr() != square_sum.data_ptr()


def test_scores_of_negative_zero_are_positive_zero() -> None:
    """The key of a score is its bits without the sign: -0 would rank above everything."""
    zero = torch.tensor([-0.0])
    assert not bool(ops.score(None, zero).signbit())
    assert not bool(ops.score(zero, torch.zeros(1)).signbit())


def test_score_of_infinite_over_infinite_is_zero() -> None:
    infinite = torch.tensor([float("inf")])
    assert ops.score(infinite, infinite).item() == 0.0
    assert ops.score(infinite, torch.ones(1)).item() == float("inf")
    assert ops.score(torch.ones(1), infinite).item() == 0.0


@each(lam=[0.0, -1.0, float("nan")])
def test_score_refuses_a_lambda_that_is_not_positive(lam: float) -> None:
    with pytest.raises(ValueError, match="lam must be positive"):
        ops.score(torch.ones(1), torch.ones(1), lam)


@each(n=SIZES, digit=[(20, 11), (10, 10), (0, 10), (30, 1), (0, 31 - 20)])
def test_score_histogram_equals_numpy(n: int, digit: tuple[int, int]) -> None:
    shift, bits = digit
    score = values(n, seed=5).abs().nan_to_num(nan=0.0, posinf=float("inf"))
    key = score.numpy().view(np.uint32).astype(np.int64)
    leading = shift + bits == 31
    prefix = int(key[n // 2] >> (shift + bits)) if n and not leading else 0
    kept = key if leading else key[key >> (shift + bits) == prefix]
    want = np.bincount((kept >> shift) & (2**bits - 1), minlength=2**bits).astype(np.int64)
    counts = torch.full((2**bits,), 3)
    ops.score_histogram_(counts, None, score, 1.0, shift, bits, prefix)
    assert_same_bits(counts, want + 3)


def test_order_of_keys_is_order_of_scores() -> None:
    score = values(10_007, seed=6).abs().nan_to_num(nan=0.0, posinf=float("inf")).numpy()
    by_key = np.argsort(score.view(np.int32), kind="stable")
    np.testing.assert_array_equal(by_key, np.argsort(score, kind="stable"))


@each(n=SIZES, density=[0.0, 0.001, 0.3, 1.0])
def test_index_to_mask_equals_packbits(n: int, density: float) -> None:
    index = positions(n, density)
    flags = np.zeros(n, dtype=bool)
    flags[index] = True
    assert_same_bits(ops.index_to_mask(torch.from_numpy(index), n), np.packbits(flags, bitorder="little"))


@each(n=SIZES, density=[0.0, 0.001, 0.3, 1.0])
def test_mask_to_index_equals_unpackbits(n: int, density: float) -> None:
    flags = np.zeros(n, dtype=bool)
    flags[positions(n, density)] = True
    got = ops.mask_to_index(torch.from_numpy(np.packbits(flags, bitorder="little")))
    assert_same_bits(got, np.flatnonzero(flags).astype(np.int64))


@each(order=["ascending", "descending"])
def test_index_to_mask_does_not_need_sorted_positions(order: str) -> None:
    index = torch.tensor([0, 1, 9, 15, 31]).sort(descending=order == "descending").values
    assert ops.index_to_mask(index, 33).tolist() == [3, 130, 0, 128, 0]


@each(n=SIZES, dtype=DTYPES, density=[0.0, 0.001, 0.3, 1.0])
def test_apply_mask_keeps_bits_inside_and_zeroes_outside(n: int, dtype: torch.dtype, density: float) -> None:
    grad = values(n, dtype)
    index = positions(n, density)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    before = grad.clone().view(bits).numpy()
    ops.apply_mask_(grad, torch.from_numpy(index))
    want = np.zeros_like(before)
    want[index] = before[index]
    np.testing.assert_array_equal(grad.view(bits).numpy(), want)


def test_apply_mask_writes_through_a_view_and_nothing_beside_it() -> None:
    buffer = torch.ones(10)
    ops.apply_mask_(buffer[3:7], torch.tensor([0, 3]))
    assert buffer.tolist() == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1]


@each(which=["grad_sum", "square_sum"])
def test_accumulate_refuses_unequal_shapes(which: str) -> None:
    sums = {"grad_sum": torch.zeros(4), "square_sum": torch.zeros(4)} | {which: torch.zeros(5)}
    with pytest.raises(ValueError, match="expected equal 1-D shapes"):
        ops.accumulate_(torch.zeros(4), scale=1.0, num_nonfinite=torch.zeros(1).long(), **sums)


def test_accumulate_refuses_two_dimensions() -> None:
    two = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="1-D"):
        ops.accumulate_(two, two.clone(), two.clone(), 1.0, torch.zeros(1).long())


def test_score_histogram_refuses_counts_of_another_width() -> None:
    with pytest.raises(RuntimeError):
        ops.score_histogram_(torch.zeros(1024, dtype=torch.int64), None, torch.ones(3), 1.0, 20, 11, 0)


def test_positions_outside_are_refused() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        ops.apply_mask_(torch.ones(4), torch.tensor([4]))
    with pytest.raises((IndexError, RuntimeError)):
        ops.index_to_mask(torch.tensor([8]), 8)


def test_accumulate_of_a_strided_gradient_is_right() -> None:
    """Providers may require contiguous tensors; the reference gives the right sums or an error, never wrong ones."""
    grad = torch.arange(8.0)[::2]
    square_sum = torch.zeros(4)
    ops.accumulate_(grad, None, square_sum, 1.0, torch.zeros(1).long())
    assert square_sum.tolist() == [0.0, 4.0, 16.0, 36.0]


@each(op=list(ops.schema.SCHEMAS))
def test_every_op_names_its_provider(op: str) -> None:
    assert ops.provider(op, "cpu") == "cpp"
