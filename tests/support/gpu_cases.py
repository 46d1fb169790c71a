"""One list of calls for every op, at the sizes and values that hurt, and how an answer is held to the reference.

Used by the providers for CUDA: interpreted (Triton) and emulated (CUDA C++) on a CPU, and both on a GPU.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from piece_ds.ops import reference

SIZES = [0, 1, 31, 32, 33, 1021, 1024, 1025, 5003]
FEW_SIZES = [0, 33, 1025]
EDGES = [0, 32, 33, 1024, 1025]
LARGE = [8192 * 9 + 1, (1 << 18) + 3]  # past one block of every kernel
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = [float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-45, -1e-40, 1e-39, 3.4e38, 6e4, 1.0, -1.0]
BEYOND_32_BITS = (1 << 33) + 7

# Positions of the arguments that an op fills as (candidate_score, candidate_index, num_candidates).
CANDIDATES = {"accumulate_filter_": (8, 9, 10), "filter_": (5, 6, 7)}
# Positions of sums whose order of additions is the provider's, with the tolerance (relative, absolute).
FREE_ORDER = {
    "apply_mask_": {3: (1e-12, 0.0)},
    "apply_mask_list_": {3: (1e-12, 0.0)},
    "sampled_gradient_": {4: (1e-5, 1e-4)},
}


Place = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parts:
    """A list of tensors: a tensor cut into parts, which lie side by side, or each in memory of its own."""

    tensor: Tensor
    sizes: tuple[int, ...]
    apart: bool


@dataclass(frozen=True)
class Case:
    """A call: op, a readable name, and its arguments as CPU tensors and numbers."""

    op: str
    name: str
    arguments: tuple[Any, ...]


def values(n: int, kind: str = "mixed", dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """n numbers: of many magnitudes with every special one at both ends, or all the same."""
    if kind != "mixed":
        return torch.full((n,), {"zero": 0.0, "ties": 0.75}[kind], dtype=dtype)
    generator = torch.Generator().manual_seed(seed + n)
    exponent = torch.randint(-20, 15, (n,), generator=generator)
    x = torch.randn(n, generator=generator) * 10.0**exponent
    special = torch.tensor(SPECIAL)[:n]
    x[: special.numel()] = special
    if n > 2 * len(SPECIAL):
        x[-len(SPECIAL) :] = torch.tensor(SPECIAL)
    return x.to(dtype)


def sums_of(n: int, kind: str, with_sum: bool) -> tuple[Tensor | None, Tensor]:
    return values(n, kind, seed=1) if with_sum else None, values(n, kind, seed=2).abs()


def positions(n: int, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, generator=generator) < density).nonzero().squeeze(1)


def counter(start: int = 0) -> Tensor:
    return torch.tensor([start])


def room(capacity: int, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((capacity,), -1.0), torch.full((capacity,), -1), counter(start)


def _accumulate(n: int) -> Iterator[Case]:
    for dtype in DTYPES:
        for with_sum, scale in ((True, 1.0), (True, 0.3), (False, 1 / 1024)):
            grad, sums = values(n, dtype=dtype), (values(n, seed=3) if with_sum else None, values(n, seed=4).abs())
            yield Case("accumulate_", f"{dtype}-{with_sum}-{scale}", (grad, *sums, scale, counter(40)))
            for bound, capacity in ((0.5, n), (0.5, n // 3), (0.0, n)):
                arguments = (grad, *sums, scale, counter(40), 1.0, bound, BEYOND_32_BITS, *room(capacity))
                yield Case("accumulate_filter_", f"{dtype}-{with_sum}-{scale}-{bound}-{capacity}", arguments)


def _scores(n: int) -> Iterator[Case]:
    for kind in ("mixed", "ties", "zero"):
        for with_sum in (True, False):
            sums, name = sums_of(n, kind, with_sum), f"{kind}-{with_sum}"
            for lam in (1.0, 1e-8):
                yield Case("score", f"{name}-{lam}", (*sums, lam))
            keys = reference.score(*sums, 1.0).view(torch.int32)
            middle = int(keys[n // 2]) if n else 0
            for shift, bits in ((20, 11), (10, 10), (0, 10), (16, 15), (0, 0), (15, 16)):
                prefix = middle >> (shift + bits) if shift + bits < 31 else 0
                samples = ((16, 64), (3, 7)) if bits in (11, 15) else ()
                for run, stride in ((1, 1), *samples):
                    counts = torch.full((1 << bits,), 3)
                    arguments = (counts, *sums, 1.0, shift, bits, prefix, run, stride)
                    yield Case("score_histogram_", f"{name}-{shift}-{bits}-{run}-{stride}", arguments)
            at_middle = float(torch.tensor(middle, dtype=torch.int32).view(torch.float32))
            for bound, capacity in ((0.5, n), (at_middle, n), (1e-40, n), (0.0, n // 2), (float("inf"), 3)):
                arguments = (*sums, 1.0, bound, BEYOND_32_BITS, *room(capacity))
                yield Case("filter_", f"{name}-{bound}-{capacity}", arguments)
            for num_ties in (0, 1, n // 3, 2 * n + 1):
                yield Case("select_above", f"{name}-{num_ties}", (*sums, 1.0, middle, num_ties))
            yield Case("select_above", f"{name}-none", (*sums, 1.0, 0x7F800000, 0))


def _masks(n: int) -> Iterator[Case]:
    for density in (0.0, 0.001, 0.3, 1.0):
        index = positions(n, density)
        yield Case("index_to_mask", f"{density}", (index.flip(0), n))
        bits = reference.index_to_mask(index, n)
        yield Case("mask_to_index", f"{density}", (bits,))
        for dtype in DTYPES:
            for scale in (1.0, 0.3):
                grad = values(n, dtype=dtype)
                finite = grad.masked_fill(~grad.isfinite() | (grad.abs() > 1e18), 0.5)
                for name, each in (("special", grad), ("finite", finite)):
                    arguments = (each, index, scale, torch.ones(1, dtype=torch.float64), counter(2))
                    yield Case("apply_mask_", f"{dtype}-{density}-{scale}-{name}", arguments)
            yield Case("gather_add_", f"{dtype}-{density}", (values(n, dtype=dtype), index, 0.3, values(index.numel())))
            yield from _adamw(n, dtype, density, index)
            yield from _lists(n, dtype, density, index)


def _lists(n: int, dtype: torch.dtype, density: float, index: Tensor) -> Iterator[Case]:
    """As one tensor cut in parts, as two, as more than one launch takes of them; some are empty."""
    k = index.numel()
    state = values(k, seed=5), values(k, seed=6), values(k, seed=7), values(k, seed=8).abs()
    for name, size, apart in (("flat", 7, False), ("two", n // 2 + 1, True), ("many", 5, True)):
        sizes = [0, *(min(size, n - begin) for begin in range(0, n, max(size, n // 400))), 0]
        sizes.append(n - sum(sizes))
        parts, what = Parts(values(n, dtype=dtype), tuple(sizes), apart), f"{dtype}-{density}-{name}"
        yield Case("apply_mask_list_", what, (parts, index, 1.0, None, None))
        yield Case(
            "apply_mask_list_", f"{what}-scaled", (parts, index, 0.3, torch.ones(1, dtype=torch.float64), counter(2))
        )
        yield Case("scatter_list_", what, (parts, index, values(k, dtype=dtype, seed=9)))
        # A GPU's NaN has other bits than the one it came from, so only a weight that holds its value may be left alone.
        held = parts.tensor.clone()
        held[index] = state[1].to(dtype)
        for holds_value, weights in ((False, parts), (True, Parts(held, parts.sizes, apart))):
            numbers = (0.5, 1e-3, 0.9, 0.999, 1e-8, 0.1, 3, holds_value)
            yield Case("sparse_adamw_list_", f"{what}-{holds_value}", (*state, weights, index, *numbers))


def _adamw(n: int, dtype: torch.dtype, density: float, index: Tensor) -> Iterator[Case]:
    k = index.numel()
    state = values(k, seed=5), values(k, seed=6), values(k, seed=7), values(k, seed=8).abs()
    weight = torch.ones(n, dtype=dtype)
    for holds_value in (False, True):
        weight = weight.clone()
        if holds_value:
            weight[index] = state[1].to(dtype)
        for lr in (1e-3, 1e-6):
            numbers = (0.5, lr, 0.9, 0.999, 1e-8, 0.1, 3, holds_value)
            yield Case("sparse_adamw_", f"{dtype}-{density}-{holds_value}-{lr}", (*state, weight, index, *numbers))


def _sampled() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for tokens, outputs, inputs in ((0, 3, 4), (1, 1, 1), (7, 5, 33), (300, 64, 31), (129, 1, 257), (65, 4000, 2100)):
        for dtype in DTYPES:
            left = torch.randn(tokens, outputs, generator=generator).to(dtype)
            right = torch.randn(tokens, inputs, generator=generator).to(dtype)
            index = positions(outputs * inputs, min(1.0, 200 / (outputs * inputs)))
            total = torch.ones(index.numel())
            yield Case("sampled_gradient_", f"{tokens}-{outputs}-{inputs}-{dtype}", (left, right, index, 0.3, total))


def cases(sizes: list[int]) -> Iterator[Case]:
    """Every op at every size, each with other values and settings."""
    for n in sizes:
        for case in (*_accumulate(n), *_scores(n), *_masks(n)):
            yield Case(case.op, f"n={n}-{case.name}", case.arguments)
    yield from _sampled()


def each_placed(argument: Any, put: Place) -> Any:
    """argument with its tensors copied by put."""
    if isinstance(argument, Parts):
        if argument.apart:
            return _placed_apart(argument.tensor.split(argument.sizes), put)
        return list(put(argument.tensor).split(argument.sizes))
    return put(argument) if isinstance(argument, Tensor) else argument


def _placed_apart(parts: tuple[Tensor, ...], put: Place) -> list[Tensor]:
    """Some of many parts, and the last ones, copied by put; the others with gaps between them in one piece of memory.

    A process has so many regions of guarded memory, and a watched allocation takes its time.
    """
    room = torch.empty(sum(part.numel() + 8 for part in parts), dtype=parts[0].dtype, device=put(parts[0][:0]).device)
    result, begin = [], 0
    for i, part in enumerate(parts):
        if i % 64 == 0 or i >= len(parts) - 2:
            result.append(put(part))
            continue
        result.append(room[begin : begin + part.numel()].copy_(part))
        begin += part.numel() + 8
    return result


def placed(tensor: Tensor, device: str, shift: int) -> Tensor:
    """A copy of tensor on device, `shift` elements after the start of its memory."""
    whole = torch.empty(tensor.numel() + shift, dtype=tensor.dtype, device=device)
    return whole[shift:].view(tensor.shape).copy_(tensor)


def run_cases(
    provider: Callable[[str], Callable[..., Any]], chosen: Iterable[Case], device: str, place: Place | None = None
) -> dict[str, tuple[int, list[str]]]:
    """Check every case; returns op -> (number of cases, failures). provider gives the function of an op."""
    results: dict[str, tuple[int, list[str]]] = {}
    for case in chosen:
        number, failures = results.get(case.op, (0, []))
        # The last line names the case where one ends the process.
        print(case.op, case.name, file=sys.stderr)
        try:
            # Most tensors of a model begin on 16 bytes, a fragment may begin anywhere.
            check(case, provider(case.op), device, shift=number % 4, place=place if number % 2 else None)
        except Exception as error:
            failures.append(f"{case.name}: {type(error).__name__}: {error}")
        results[case.op] = (number + 1, failures)
    return results


def check(case: Case, provider: Callable[..., Any], device: str, shift: int = 0, place: Place | None = None) -> None:
    """Run the case on device with provider and on the CPU with the reference; they must agree.

    Args:
        shift: tensors begin so many elements after the start of their memory.
        place: instead, what copies a tensor to where provider gets it.
    Raises:
        AssertionError: they do not; says where.
    """
    want = [each_placed(argument, Tensor.clone) for argument in case.arguments]
    got = [each_placed(argument, place or partial(placed, device=device, shift=shift)) for argument in case.arguments]
    triple = CANDIDATES.get(case.op)
    if triple:  # the whole set, whatever the room
        n, start = want[triple[1]].numel(), int(want[triple[2]])
        most = max(part.numel() for part in want if isinstance(part, Tensor)) + n + start
        want[triple[0]], want[triple[1]] = torch.zeros(most), torch.zeros(most, dtype=torch.int64)
    result = provider(*got), getattr(reference, case.op)(*want)
    if result[1] is not None:
        assert_same(*result, "result")
    for i, (first, second) in enumerate(zip(got, want, strict=True)):
        for number, pair in enumerate(zip(first, second, strict=True) if isinstance(second, list) else ()):
            assert_same(*pair, f"argument {i}[{number}]")
        if not isinstance(second, Tensor) or (triple and i in triple[:2]):
            continue
        if i in FREE_ORDER.get(case.op, {}):
            rtol, atol = FREE_ORDER[case.op][i]
            torch.testing.assert_close(first.cpu(), second, rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert_same(first, second, f"argument {i}")
    if triple:
        assert_candidates([got[i].cpu() for i in triple], [want[i] for i in triple])


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """Equal bits, which tells +0 from -0; any NaN equals any other."""
    assert got.dtype == want.dtype, f"{what}: {got.dtype} instead of {want.dtype}"
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    got = got.cpu()
    if not want.is_floating_point():
        wrong = (got != want).flatten().nonzero().flatten()
    else:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[want.element_size()]
        both_nan = got.isnan() & want.isnan()
        wrong = ((got.view(bits) != want.view(bits)) & ~both_nan).flatten().nonzero().flatten()
    if wrong.numel():
        first = int(wrong[0])
        raise AssertionError(
            f"{what}: {wrong.numel()} of {want.numel()} differ, the first at {first}: "
            f"{got.flatten()[first]} instead of {want.flatten()[first]}"
        )


def assert_candidates(got: list[Tensor], want: list[Tensor]) -> None:
    """The same set in any order, or, where the room ended, that many different members of it."""
    (score, index, _), (all_scores, all_indices, num_found) = got, want
    n = int(num_found)
    stored = min(n, index.numel())
    assert bool((index[stored:] == -1).all()), "written beyond the last candidate"
    if stored == 0:
        return
    index, order = index[:stored].sort()
    assert bool((index[1:] > index[:-1]).all()), "a candidate was written twice"
    place = torch.searchsorted(all_indices[:n], index).clamp(max=n - 1)  # the reference finds them in order
    assert torch.equal(all_indices[place], index), "not a candidate"
    assert_same(score[:stored][order], all_scores[place], "scores of candidates")
