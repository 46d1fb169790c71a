"""What the C++ provider promises beyond the reference: threads, order, and errors before anything is written."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.op_cases import BLOCK, INSTRUCTION_SETS, sums, values
from torch import Tensor

from piece_ds import ops

N = 4 * BLOCK + 77
INDEX = torch.from_numpy(np.flatnonzero(np.random.default_rng(0).random(N) < 0.01))
K = INDEX.numel()


pytestmark = [
    pytest.mark.usefixtures("cpu_provider"),
    pytest.mark.parametrize("cpu_provider", INSTRUCTION_SETS, indirect=True, scope="module"),
]


def count() -> Tensor:
    return torch.zeros(1, dtype=torch.int64)


def accumulate() -> list[Tensor]:
    out = [*(x.clone() for x in sums(N, seed=1)), count()]
    ops.accumulate_(values(N, torch.bfloat16), out[0], out[1], 0.5, out[2])
    return out


def accumulate_filter() -> list[Tensor]:
    grad_sum, square_sum = (x.clone() for x in sums(N, seed=1))
    found = ops.empty_candidates(N, "cpu")
    ops.accumulate_filter_(values(N), grad_sum, square_sum, 1.0, count(), 1.0, 0.5, 7, found)
    return [grad_sum, square_sum, *filled(found)]


def filter_() -> list[Tensor]:
    found = ops.empty_candidates(N, "cpu")
    ops.filter_(*sums(N, seed=1), 1.0, 1e-3, 7, found)
    return filled(found)


def filled(found: ops.Candidates) -> list[Tensor]:
    return [found.score[: found.count()], found.index[: found.count()]]


def histogram() -> list[Tensor]:
    counts = torch.zeros(2048, dtype=torch.int64)
    ops.score_histogram_(counts, *sums(N, seed=1), 1.0, 20, 11, 0)
    return [counts]


def apply_mask() -> list[Tensor]:
    grad, square_norm = torch.randn(N, generator=torch.Generator().manual_seed(1)), torch.zeros(1, dtype=torch.float64)
    ops.apply_mask_(grad, INDEX, 0.3, square_norm)
    return [grad, square_norm]


def sampled_gradient() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    grad_output, input = torch.randn(700, 100, generator=generator), torch.randn(700, 300, generator=generator)
    total = torch.zeros(3000)
    ops.sampled_gradient_(grad_output, input, torch.arange(0, 30_000, 10), 0.5, total)
    return [total]


def sparse_adamw() -> list[Tensor]:
    out = [*(values(K, seed=seed).nan_to_num(1.0, 1.0, 1.0).abs() for seed in range(4)), torch.zeros(N).bfloat16()]
    ops.sparse_adamw_(*out, INDEX, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=2)
    ops.sparse_adamw_(
        *out, INDEX, lr=1e-6, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, step=3, weight_holds_value=True
    )
    return out


def gather_add() -> list[Tensor]:
    total = torch.zeros(K)
    ops.gather_add_(values(N).nan_to_num(1.0), INDEX, 0.5, total)
    return [total]


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "accumulate_": accumulate,
    "accumulate_filter_": accumulate_filter,
    "score": lambda: [ops.score(*sums(N, seed=1))],
    "score_histogram_": histogram,
    "filter_": filter_,
    "select_above": lambda: [ops.select_above(*sums(N, seed=1), 1.0, 0x3F800000, 0)],
    "index_to_mask": lambda: [ops.index_to_mask(INDEX, N)],
    "mask_to_index": lambda: [ops.mask_to_index(torch.arange(N).to(torch.uint8))],
    "apply_mask_": apply_mask,
    "gather_add_": gather_add,
    "sampled_gradient_": sampled_gradient,
    "sparse_adamw_": sparse_adamw,
}


def test_every_op_has_a_case() -> None:
    in_a_test_of_their_own = [name for name in ops.schema.SCHEMAS if name.endswith("_list_")]  # test_ops_lists.py
    assert {*CALLS, *in_a_test_of_their_own} == set(ops.schema.SCHEMAS)


@pytest.mark.parametrize("op", CALLS)
def test_any_number_of_threads_and_any_repetition_gives_the_same_bits(op: str, cpu_provider: str) -> None:
    """Threads are shared out by code that no instruction set has a copy of: one repeats it often."""
    want = CALLS[op]()
    before = torch.get_num_threads()
    try:
        for threads in [3, *[2] * (20 if cpu_provider == "scalar" else 4)]:
            torch.set_num_threads(threads)
            for got, expected in zip(CALLS[op](), want, strict=True):
                assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("find", [filter_, accumulate_filter])
def test_candidates_come_in_ascending_order(find: Callable[[], list[Tensor]]) -> None:
    index = find()[-1]
    assert index.numel() > 1000
    assert (index.diff() > 0).all()


def test_a_position_outside_is_found_before_anything_is_written() -> None:
    for position in (-1, N):
        index = INDEX.clone()
        index[K // 2] = position
        grad, value = torch.ones(N), torch.ones(K)
        with pytest.raises(RuntimeError, match=rf"position outside \[0, {N}\)"):
            ops.apply_mask_(grad, index)
        with pytest.raises(RuntimeError, match="position outside"):
            ops.sparse_adamw_(
                *[value] * 4, grad, index, lr=1.0, beta1=0.9, beta2=0.9, eps=1.0, weight_decay=0.0, step=1
            )
        with pytest.raises(RuntimeError, match="position outside"):
            ops.gather_add_(grad, index, 1.0, value)
        assert grad.eq(1.0).all()
        assert value.eq(1.0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.accumulate_(x, None, x.repeat(2)[::2], 1.0, count()), "square_sum must be contiguous"),
        (lambda x: ops.accumulate_(x.double(), None, x, 1.0, count()), "grad must be float32, bfloat16 or float16"),
        (lambda x: ops.accumulate_(x, None, x.bfloat16(), 1.0, count()), "square_sum must be float32"),
        (lambda x: ops.accumulate_(x, None, x, 1.0, count().int()), "num_nonfinite must be int64"),
        (lambda x: ops.apply_mask_(x.repeat(2)[::2], count()), "grad must be contiguous"),
        (lambda x: ops.apply_mask_(x, count().int()), "index must be int64"),
        (lambda x: ops.gather_add_(x, count(), 1.0, x), "total must have 1 elements, got 9"),
        (lambda x: ops.score(x[:4], x), "grad_sum must have 9 elements, got 4"),
        (lambda x: ops.mask_to_index(x), "bits must be uint8"),
        (lambda x: ops.score_histogram_(torch.zeros(1 << 17).long(), None, x, 1.0, 14, 17, 0), "0 <= bits <= 16"),
        (lambda x: ops.score_histogram_(count(), None, x, 1.0, 0, 0, 0, 0, 4), "run >= 1"),
        (lambda x: ops.sampled_gradient_(x[None], x[None].half(), count(), 1.0, x[:1]), "the same dtype"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(torch.ones(9))


def test_strided_inputs_are_read_right() -> None:
    strided, total = torch.arange(12.0).reshape(3, 4).t(), torch.zeros(2)
    ops.sampled_gradient_(strided, strided, torch.tensor([1, 5]), 1.0, total)
    want = (strided.t() @ strided).reshape(-1)
    assert total.tolist() == [want[1].item(), want[5].item()]


@pytest.mark.slow
def test_positions_beyond_two_to_the_31() -> None:
    n = (1 << 31) + 70
    index = torch.tensor([0, (1 << 31) - 1, 1 << 31, n - 1])
    assert torch.equal(ops.mask_to_index(ops.index_to_mask(index, n)), index)
    grad, total = torch.ones(n, dtype=torch.bfloat16), torch.zeros(4)
    grad[index] = torch.tensor([2.0, 3.0, 4.0, 5.0]).bfloat16()
    ops.gather_add_(grad, index, 1.0, total)
    assert total.tolist() == [2.0, 3.0, 4.0, 5.0]
    ops.apply_mask_(grad, index)
    assert grad[index].tolist() == [2.0, 3.0, 4.0, 5.0]
    assert grad.count_nonzero() == 4
