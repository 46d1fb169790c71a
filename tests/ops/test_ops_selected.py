"""Work on the selected elements equals numpy or float64, for every provider."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.op_cases import BLOCK, DTYPES, F32, assert_same_bits, positions, values
from support.tables import each
from torch import Tensor

from piece_ds import ops

pytestmark = pytest.mark.usefixtures("cpu_provider")

SIZES = [1, 7, 33, 1009, BLOCK - 1, 2 * BLOCK + 77]
TOKENS = [1, 15, 63, 64, 65, 200]


def rounded(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp32 values as dtype stores them, in fp32 again."""
    return torch.from_numpy(x).to(dtype).float().numpy()


def finite(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return values(n, torch.float32, seed).nan_to_num(0.5, 0.5, 0.5).clamp(-100, 100).to(dtype)


@each(n=SIZES, dtype=DTYPES, scale=[1.0, 1 / 1024, 0.3])
def test_apply_mask_scales_and_gives_the_norm(n: int, dtype: torch.dtype, scale: float) -> None:
    for density in [0.0, 0.001, 0.3, 1.0]:
        buffer = torch.ones(n + 9, dtype=dtype)
        grad = buffer[3 : 3 + n]  # begins where no vector does
        grad.copy_(values(n, dtype, seed=20))
        index = positions(n, density)
        kept = grad.float().numpy()[index]
        with np.errstate(over="ignore", invalid="ignore"):
            kept = kept if scale == 1.0 else rounded(kept * F32(scale), dtype)
            square = (kept.astype(np.float64) ** 2).sum()
        square_norm, count = torch.tensor([2.0], dtype=torch.float64), torch.tensor([40])
        ops.apply_mask_(grad, torch.from_numpy(index), scale, square_norm, count)
        want = np.zeros(n, dtype=F32)
        want[index] = kept
        np.testing.assert_array_equal(grad.float().numpy(), want)  # also NaN to NaN
        np.testing.assert_allclose(square_norm.item(), 2.0 + square, rtol=1e-12)
        assert count.item() == 40 + (~np.isfinite(kept)).sum()
        assert buffer[:3].eq(1).all()
        assert buffer[3 + n :].eq(1).all()


def test_apply_mask_beyond_the_cache_writes_every_element() -> None:
    """Large gradients are written past the cache, from a start that is no cache line's."""
    grad = torch.ones(5_000_003)[1:]
    index = torch.arange(0, grad.numel(), 997)
    square_norm = torch.zeros(1, dtype=torch.float64)
    ops.apply_mask_(grad, index, 1.0, square_norm)
    assert grad.count_nonzero() == index.numel() == square_norm.item()
    assert grad[index].eq(1.0).all()


@each(order=["descending", "shuffled"])
def test_apply_mask_does_not_need_sorted_positions(order: str) -> None:
    index = torch.arange(0, 1009, 3)
    index = index.flip(0) if order == "descending" else index[torch.randperm(index.numel())]
    grad, before = torch.arange(1009.0), index.clone()
    ops.apply_mask_(grad, index)
    assert grad.count_nonzero() == index.numel() - 1  # the element 0 is 0
    assert torch.equal(index, before)


@each(n=SIZES, dtype=DTYPES, scale=[1.0, 0.3])
def test_gather_add_equals_numpy(n: int, dtype: torch.dtype, scale: float) -> None:
    grad = values(n + 1, dtype, seed=21)[1:]
    index = np.random.default_rng(n).permutation(positions(n, 0.3))
    total = finite(index.size, seed=22)
    with np.errstate(over="ignore"):
        want = total.numpy() + grad.float().numpy()[index] * F32(scale)
    ops.gather_add_(grad, torch.from_numpy(index), scale, total)
    np.testing.assert_array_equal(total.numpy(), want)


@each(
    shape=[(1, 1), (16, 16), (17, 31), (97, 130), (33, 1009)],
    dtype=DTYPES,
    density=[0.001, 0.01, 0.1, 1.0],
)
def test_sampled_gradient_equals_the_dense_product(shape: tuple[int, int], dtype: torch.dtype, density: float) -> None:
    out, width = shape
    index = positions(out * width, density)
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        grad_output = torch.randn(tokens, out, generator=generator).to(dtype)
        input = torch.randn(tokens, width, generator=generator).to(dtype)
        total = torch.full((index.size,), 0.5)
        ops.sampled_gradient_(grad_output, input, torch.from_numpy(index), 0.3, total)
        left, right = grad_output.double().numpy(), input.double().numpy()
        want = 0.5 + 0.3 * (left.T @ right).reshape(-1)[index]
        # Every order of T products and sums stays within T rounding errors of the sum of magnitudes.
        magnitude = 0.5 + 0.3 * (np.abs(left).T @ np.abs(right)).reshape(-1)[index]
        assert (np.abs(total.numpy() - want) <= (tokens + 3) * 2.0**-24 * magnitude).all()


def test_sampled_gradient_of_no_tokens_adds_nothing() -> None:
    total = torch.ones(2)
    ops.sampled_gradient_(torch.zeros(0, 3), torch.zeros(0, 4), torch.tensor([0, 11]), 1.0, total)
    assert total.tolist() == [1.0, 1.0]


def test_sampled_gradient_takes_a_non_finite_token_where_it_belongs() -> None:
    grad_output, input = torch.ones(65, 20), torch.ones(65, 40)
    input[64, 39] = float("inf")
    total = torch.zeros(3)
    ops.sampled_gradient_(grad_output, input, torch.tensor([0, 38, 39]), 1.0, total)
    assert total.tolist() == [65.0, 65.0, float("inf")]


def adamw_oracle(state: list[np.ndarray], grad: np.ndarray, h: dict[str, float]) -> None:
    """torch.optim.AdamW's order of operations in fp32, each rounded once."""
    value, first, second = state
    g = grad * F32(h["grad_scale"])
    value *= F32(1 - h["lr"] * h["weight_decay"])
    first += (g - first) * F32(1 - h["beta1"])
    second[:] = second * F32(h["beta2"]) + (g * g) * F32(1 - h["beta2"])
    correction = F32(1 / math.sqrt(1 - h["beta2"] ** h["step"]))
    denominator = np.sqrt(second) * correction + F32(h["eps"])
    value -= (first / denominator) * F32(h["lr"] / (1 - h["beta1"] ** h["step"]))


@each(k=[0, 1, 15, 16, 17, 255, 257, 4097, 9001], dtype=DTYPES)
def test_sparse_adamw_equals_numpy(k: int, dtype: torch.dtype) -> None:
    h = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.3, "step": 0}
    index = torch.from_numpy(np.random.default_rng(k).permutation(3 * k + 1)[:k].copy())
    weight = finite(3 * k + 1, dtype, seed=23)
    untouched = weight.clone()
    value, exp_avg, exp_avg_sq = finite(k, seed=24), torch.zeros(k), torch.zeros(k)
    state = [value.numpy().copy(), np.zeros(k, dtype=F32), np.zeros(k, dtype=F32)]
    for step in range(1, 4):
        grad = finite(k, seed=24 + step)
        h["step"] = step
        ops.sparse_adamw_(grad, value, exp_avg, exp_avg_sq, weight, index, **h)
        adamw_oracle(state, grad.numpy(), h)
    for got, want in zip((value, exp_avg, exp_avg_sq), state, strict=True):
        assert_same_bits(got, want)
    untouched[index] = value.to(dtype)
    assert torch.equal(weight, untouched)


@each(k=[0, 1, 15, 17, 255, 256, 257, 4097, 9001], dtype=DTYPES)
def test_sparse_adamw_writes_only_what_rounds_differently(k: int, dtype: torch.dtype) -> None:
    """All of the weight is 7 here: what is still 7 has not been written."""
    index = torch.from_numpy(np.random.default_rng(k).permutation(3 * k + 1)[:k].copy())
    state = [values(k, seed=seed) for seed in (24, 25)] + [values(k, seed=26).abs()]
    before = state[0].clone()
    weight = torch.full((3 * k + 1,), 7.0, dtype=dtype)
    numbers = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    ops.sparse_adamw_(values(k, seed=27), *state, weight, index, weight_holds_value=True, **numbers)
    size = torch.int32 if dtype == torch.float32 else torch.int16
    changed = before.to(dtype).view(size) != state[0].to(dtype).view(size)
    changed &= ~(before.isnan() & state[0].isnan())  # one NaN is like another
    want = torch.full_like(weight, 7.0)
    want[index[changed]] = state[0].to(dtype)[changed]
    assert torch.equal(weight.isnan(), want.isnan())
    assert_same_bits(weight.float().nan_to_num(3.0), want.float().nan_to_num(3.0).numpy())
    if k > 1000:
        assert changed.any()
        assert not changed.all()


@each(dtype=DTYPES)
def test_sparse_adamw_of_a_weight_that_holds_its_values_gives_the_same(dtype: torch.dtype) -> None:
    k = 5000
    index = torch.from_numpy(np.random.default_rng(k).permutation(2 * k)[:k].copy())
    results = []
    for holds_value in (False, True):
        state = [finite(k, seed=24), torch.zeros(k), torch.zeros(k)]
        weight = finite(2 * k, dtype, seed=23)
        weight[index] = state[0].to(dtype)
        for step in range(1, 9):
            numbers = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "step": step}
            ops.sparse_adamw_(finite(k, seed=step), *state, weight, index, weight_holds_value=holds_value, **numbers)
        results.append((weight, *state))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sparse_adamw_follows_torch_for_50_steps() -> None:
    k, generator = 1000, torch.Generator().manual_seed(0)
    parameter = torch.randn(k, generator=generator).requires_grad_()
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=0.1)
    value, exp_avg, exp_avg_sq = parameter.detach().clone(), torch.zeros(k), torch.zeros(k)
    weight, index = torch.zeros(2 * k), torch.arange(0, 2 * k, 2)
    for step in range(1, 51):
        parameter.grad = torch.randn(k, generator=generator)
        optimizer.step()
        ops.sparse_adamw_(
            parameter.grad,
            value,
            exp_avg,
            exp_avg_sq,
            weight,
            index,
            lr=1e-2,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            step=step,
        )
    torch.testing.assert_close(value, parameter.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(weight[index], value)


def adamw_call(index: Tensor) -> None:
    k = index.numel()
    ops.sparse_adamw_(
        *(torch.ones(k) for _ in range(4)),
        torch.ones(8),
        index,
        lr=1.0,
        beta1=0.9,
        beta2=0.9,
        eps=1.0,
        weight_decay=0.0,
        step=1,
    )


@pytest.mark.parametrize("position", [8, -9, 1 << 40])
@pytest.mark.parametrize(
    "call",
    [
        lambda index: ops.apply_mask_(torch.ones(8), index),
        lambda index: ops.gather_add_(torch.ones(8), index, 1.0, torch.zeros(2)),
        lambda index: ops.sampled_gradient_(torch.ones(3, 2), torch.ones(3, 4), index, 1.0, torch.zeros(2)),
        lambda index: ops.index_to_mask(index, 8),
        adamw_call,
    ],
    ids=["apply_mask_", "gather_add_", "sampled_gradient_", "index_to_mask", "sparse_adamw_"],
)
def test_positions_outside_are_refused_by_every_op(call: Callable[[Tensor], object], position: int) -> None:
    with pytest.raises((IndexError, RuntimeError)):
        call(torch.tensor([0, position]))
