"""One benchmark case per op: its inputs, its bytes by the model of memory traffic, and its rivals."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import baselines
import torch

from piece_ds import ops
from piece_ds.methods.estimate import select
from piece_ds.selection.alone import first_in_order
from piece_ds.selection.candidates import find_candidates
from piece_ds.selection.estimators import PIECE_S
from piece_ds.selection.scores import ScoreSource
from piece_ds.state.partition import Layout, ParameterInfo
from piece_ds.state.statistics import GradientStats

RATIO = 0.001
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

NUM_TENSORS = 291

# The sampled gradient's layers: tokens, out, in.
LINEAR_SHAPES = ((1024, 1024, 1024), (2048, 4096, 1024))


@dataclass
class Case:
    """An op at one size.

    Attributes:
        op, dtype, n: written into the row.
        num_bytes: least memory traffic of one call; 0 if the op is not bound by memory.
        run: the op.
        prepare: restores what run consumes; not timed.
        rivals: 'authors', 'best_eager', 'compile', 'topk' -> call that does the same job.
    """

    op: str
    dtype: str
    n: int
    num_bytes: float
    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)


def cases(n: int, device: str, compiled: bool) -> Iterator[Case]:
    """Yield every case at n elements except AdamW's.

    Args:
        compiled: also race torch.compile, which takes a while to compile.
    """
    compile_ = partial(torch.compile, dynamic=False) if compiled else None
    yield from _accumulate(n, device, compile_)
    yield from _selection(n, device, compile_)
    yield from _masks(n, device, compile_)
    yield from _lists(n, device)
    yield from _sampled(n, device)


def _sums(n: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums of many small gradients whose scale differs from layer to layer, as in a language model."""
    generator = torch.Generator(device).manual_seed(0)
    layer = torch.exp(torch.randn(-(-n // (1 << 16)), device=device, generator=generator))
    scale = layer.repeat_interleave(1 << 16)[:n] * 1e-2
    grad_sum = torch.randn(n, device=device, generator=generator).mul_(scale)
    square_sum = torch.rand(n, device=device, generator=generator).mul_(scale).mul_(scale).add_(grad_sum.square() / 8)
    return grad_sum, square_sum


def _accumulate(n: int, device: str, compile_: Callable | None) -> Iterator[Case]:
    grad_sum, square_sum = _sums(n, device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    for name, dtype in DTYPES.items():
        grad = (grad_sum * 1e-3).to(dtype)
        rivals: dict[str, Callable[[], object]] = {
            "authors": partial(baselines.authors_accumulate, grad, grad_sum, square_sum),
            "best_eager": partial(baselines.best_accumulate, grad, grad_sum, square_sum),
        }
        if compile_:
            rivals["compile"] = partial(compile_(baselines.authors_accumulate), grad, grad_sum, square_sum)
        size = grad.element_size()
        yield Case(
            "accumulate_",
            name,
            n,
            (size + 16) * n,
            partial(ops.accumulate_, grad, grad_sum, square_sum, 1.0, count),
            rivals=rivals,
        )
        yield Case(
            "accumulate_ (squares only)",
            name,
            n,
            (size + 8) * n,
            partial(ops.accumulate_, grad, None, square_sum, 1.0, count),
        )
        bound = _kth_score(grad_sum, square_sum, int(1.5 * RATIO * n))
        room = ops.empty_candidates(4 * int(RATIO * n) + 65536, device)
        yield Case(
            "accumulate_filter_",
            name,
            n,
            (size + 16) * n,
            partial(ops.accumulate_filter_, grad, grad_sum, square_sum, 1.0, count, 1.0, bound, 0, room),
            prepare=room.num_found.zero_,
        )


def _kth_score(grad_sum: torch.Tensor, square_sum: torch.Tensor, k: int) -> float:
    return float(ops.score(grad_sum, square_sum).topk(max(1, k)).values[-1])


def _selection(n: int, device: str, compile_: Callable | None) -> Iterator[Case]:
    grad_sum, square_sum = _sums(n, device)
    k = max(1, int(RATIO * n))
    layout = Layout((ParameterInfo("weight", (n,), n, True),), 0, 1)
    stats = GradientStats(layout, square_sum, grad_sum)

    def selected() -> torch.Tensor:
        return select(layout, "piece-s", RATIO, stats).index["weight"]

    def packed() -> torch.Tensor:
        if device == "cpu":
            return ops.index_to_mask(selected(), n)
        source = ScoreSource(layout, {"weight": 0}, PIECE_S, stats, None, square_sum.device, 1.0, 0)
        candidates = find_candidates(source.spans, [k], layout, square_sum.device)
        assert candidates is not None
        return ops.index_to_mask(first_in_order(candidates, layout, {"weight": 0}, [k]), n)

    score = ops.score(grad_sum, square_sum)
    rivals: dict[str, Callable[[], object]] = {
        "authors": partial(baselines.authors_select, grad_sum, square_sum, k),
        "topk": partial(baselines.topk_alone, score, k),
    }
    if compile_:
        rivals["compile"] = partial(compile_(baselines.authors_select), grad_sum, square_sum, k)
    yield Case("selection, sums to packed mask", "fp32", n, 8.125 * n, packed, rivals=rivals)
    yield Case("selection, sums to positions on the host", "fp32", n, 8 * n + 8 * k, selected, rivals=rivals)
    bound, key = _kth_score(grad_sum, square_sum, int(1.5 * k)), int(score.topk(k).values[-1].view(torch.int32))
    room = ops.empty_candidates(4 * k + 65536, device)
    yield Case(
        "filter_",
        "fp32",
        n,
        8 * n,
        partial(ops.filter_, grad_sum, square_sum, 1.0, bound, 0, room),
        prepare=room.num_found.zero_,
        rivals={"best_eager": partial(baselines.boolean_filter, grad_sum, square_sum, bound)},
    )
    counts = torch.zeros(2048, dtype=torch.int64, device=device)
    yield Case(
        "score_histogram_",
        "fp32",
        n,
        8 * n,
        partial(ops.score_histogram_, counts, grad_sum, square_sum, 1.0, 20, 11, 0),
        rivals={"best_eager": partial(baselines.histogram, grad_sum, square_sum)},
    )
    yield Case("select_above", "fp32", n, 8 * n, partial(ops.select_above, grad_sum, square_sum, 1.0, key, 1))
    rivals = {
        "authors": partial(baselines.authors_score, grad_sum, square_sum),
        "best_eager": partial(baselines.best_score, grad_sum, square_sum),
    }
    if compile_:
        rivals["compile"] = partial(compile_(baselines.authors_score), grad_sum, square_sum)
    yield Case("score", "fp32", n, 12 * n, partial(ops.score, grad_sum, square_sum), rivals=rivals)


def _masks(n: int, device: str, compile_: Callable | None) -> Iterator[Case]:
    k = max(1, int(RATIO * n))
    index = torch.randperm(n, device=device)[:k].sort().values
    bits = ops.index_to_mask(index, n)
    yield Case("index_to_mask", "int64", n, n / 8 + 8 * k, partial(ops.index_to_mask, index, n))
    yield Case("mask_to_index", "uint8", n, n / 8 + 8 * k, partial(ops.mask_to_index, bits))
    norm = torch.zeros(1, dtype=torch.float64, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    scale = 1.0 / 1024
    for name, dtype in DTYPES.items():
        grad = torch.randn(n, device=device).to(dtype)
        mask = torch.zeros(n, dtype=dtype, device=device)
        mask[index] = 1.0
        rivals: dict[str, Callable[[], object]] = {
            "authors": partial(baselines.authors_apply_mask, grad, mask, scale),
            "best_eager": partial(baselines.best_apply_mask, grad, mask, scale),
        }
        if compile_:
            rivals["compile"] = partial(compile_(baselines.authors_apply_mask), grad, mask, scale)
        yield Case(
            "apply_mask_ (unscale, norm, finite)",
            name,
            n,
            grad.element_size() * n,
            partial(ops.apply_mask_, grad, index, scale, norm, count),
            rivals=rivals,
        )
        total = torch.zeros(k, device=device)
        gather = partial(baselines.gather_add, grad, index, scale, total)
        # The index, a read and write of the total, and a 64-byte line of the gradient for each entry.
        yield Case(
            "gather_add_",
            name,
            n,
            (8 + 8 + 64) * k,
            partial(ops.gather_add_, grad, index, scale, total),
            rivals={"best_eager": gather},
        )


def _lists(n: int, device: str) -> Iterator[Case]:
    """Yield cases of as many tensors as Llama-3-8B has, each with its own memory: in one call, and one by one."""
    size = -(-n // NUM_TENSORS)
    grads = [torch.randn(min(size, n - begin), device=device).bfloat16() for begin in range(0, n, size)]
    k = max(1, int(RATIO * n))
    index = torch.randint(n, (k,), device=device).unique()
    k = index.numel()
    cuts = torch.searchsorted(index, torch.arange(0, n + size, size, device=device)).tolist()
    parts = [index[low:high] - i * size for i, (low, high) in enumerate(pairwise(cuts))]
    values = torch.randn(k, device=device).bfloat16()

    def one_by_one() -> None:
        for grad, part in zip(grads, parts, strict=False):
            ops.apply_mask_(grad, part)

    def write_one_by_one() -> None:
        for i, (grad, part) in enumerate(zip(grads, parts, strict=False)):
            grad[part] = values[cuts[i] : cuts[i + 1]]

    what = f"({len(grads)} tensors)"
    rivals = {"best_eager": one_by_one}  # our own op, once per tensor
    yield Case(f"apply_mask_list_ {what}", "bf16", n, 2 * n, partial(ops.apply_mask_list_, grads, index), rivals=rivals)
    yield Case(
        f"scatter_list_ {what}",
        "bf16",
        n,
        (8 + 2 + 64) * k,
        partial(ops.scatter_list_, grads, index, values),
        rivals={"best_eager": write_one_by_one},
    )
    state = [torch.rand(k, device=device) for _ in range(4)]
    numbers = {"lr": 1e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3}

    def step_one_by_one() -> None:
        for i, (grad, part) in enumerate(zip(grads, parts, strict=False)):
            own = [tensor[cuts[i] : cuts[i + 1]] for tensor in state]
            ops.sparse_adamw_(*own, grad, part, **numbers)

    yield Case(
        f"sparse_adamw_list_ {what}",
        "bf16",
        n,
        (36 + 128) * k,
        partial(ops.sparse_adamw_list_, *state, grads, index, **numbers),
        rivals={"best_eager": step_one_by_one},
    )


def adamw_cases(n: int, device: str) -> Iterator[Case]:
    """Yield cases of sparse_adamw_ on n weights. At 50 M, the calls themselves (0.1 ms, cold) still count on a CPU.

    Cost: 22 bytes of memory for each weight, of which the dense rival holds 16.
    """
    index = torch.randint(n, (int(RATIO * n),), device=device).unique()
    k = index.numel()
    # Weights as large as a language model's; updates of about a quarter of lr.
    weight = torch.randn(n, device=device).mul_(0.02).bfloat16()
    value, grad, exp_avg = weight[index].float(), *(torch.randn(k, device=device) for _ in range(2))
    exp_avg_sq, step = torch.rand(k, device=device), torch.tensor(3.0, device=device)
    state = grad, value, exp_avg, exp_avg_sq
    run = partial(
        ops.sparse_adamw_, *state, weight, index, lr=1e-5, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=3
    )
    for _ in range(3):  # move values away from where rounding to bf16 put them
        run()
    before, start = weight[index], value.clone()
    run()
    changed, moved = float((weight[index] != before).float().mean()), float((value - start).abs().mean()) / 1e-5
    compact = {"best_eager": partial(baselines.compact_adamw, *state, step, weight, index)}
    skipping = {"best_eager": partial(baselines.changed_adamw, *state, step, weight, index)}
    dense_state = [torch.randn(n, device=device) for _ in range(3)] + [torch.rand(n, device=device)]
    dense = {"best_eager": partial(baselines.fused_adamw, *dense_state, step)}
    # Read grad, values, moments and index, write values and moments; read and write a line of every weight written.
    flat, line = 16 + 8 + 12, 128
    yield Case("sparse_adamw_ (first step: all weights written)", "bf16", n, (flat + line) * k, run, rivals=compact)
    run = partial(run, weight_holds_value=True)
    num_bytes = (flat + line * changed) * k
    print(f"a step moves values by {moved:.2f} lr on average, and changes {changed:.1%} of the selected weights")
    yield Case("sparse_adamw_", "bf16", n, num_bytes, run, rivals=compact)
    yield Case("sparse_adamw_ (against torch that writes changes only)", "bf16", n, num_bytes, run, rivals=skipping)
    yield Case("sparse_adamw_ (against dense fused AdamW)", "bf16", n, num_bytes, run, rivals=dense)


def _sampled(n: int, device: str) -> Iterator[Case]:
    for name in ("bf16", "fp32"):
        for tokens, num_out, num_in in LINEAR_SHAPES:
            if num_out * num_in > n:
                continue
            grad_output = torch.randn(tokens, num_out, device=device).to(DTYPES[name])
            x = torch.randn(tokens, num_in, device=device).to(DTYPES[name])
            k = int(RATIO * num_out * num_in)
            index = torch.randperm(num_out * num_in, device=device)[:k].sort().values
            total = torch.zeros(k, device=device)
            yield Case(
                f"sampled_gradient_ ({tokens} tokens, {num_out}x{num_in})",
                name,
                num_out * num_in,
                0,
                partial(ops.sampled_gradient_, grad_output, x, index, 1.0, total),
                rivals={"best_eager": lambda g=grad_output, x=x: g.t() @ x},
            )
