"""The ops are good citizens of torch: opcheck passes, and they trace under torch.compile(fullgraph=True)."""

import pytest
import torch
from torch import Tensor

from piece_ds import ops

SIZES = [0, 1, 33, 1023]
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True, scope="module")
def _loaded() -> None:
    """Kernels are registered by the first call through ops, or by load() where torch.ops is called directly."""
    ops.load("cpu")


def arguments(op: str, n: int) -> tuple:
    """Fresh arguments of torch.ops.piece_ds.`op` for n elements."""
    x = torch.linspace(0, 3, n)
    index = torch.arange(0, n, 3)
    count = torch.zeros(1, dtype=torch.int64)
    k = index.numel()
    numbers = (1.0, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1, True)
    room = (torch.zeros(n), torch.zeros(n, dtype=torch.int64), count.clone())
    return {
        "accumulate_": (x.bfloat16(), torch.zeros(n), torch.ones(n), 0.5, count),
        "accumulate_filter_": (x.bfloat16(), torch.zeros(n), torch.ones(n), 0.5, count, 1.0, 0.1, 7, *room),
        "score": (x - 1, x.clone(), 1.0),
        "score_histogram_": (torch.zeros(2048, dtype=torch.int64), x - 1, x.clone(), 1.0, 20, 11, 0, 2, 5),
        "filter_": (x - 1, x.clone(), 1.0, 0.5, 7, *room),
        "select_above": (None, x, 1.0, 0x3F800000, 1),
        "index_to_mask": (index, n),
        "mask_to_index": (torch.arange(n).to(torch.uint8),),
        "apply_mask_": (x, index, 0.5, torch.zeros(1, dtype=torch.float64), count),
        "gather_add_": (x.bfloat16(), index, 0.5, torch.zeros(k)),
        "sampled_gradient_": (torch.ones(5, 1), x.repeat(5, 1), index, 0.5, torch.zeros(k)),
        "apply_mask_list_": (parts(x), index, 0.5, torch.zeros(1, dtype=torch.float64), count),
        "scatter_list_": (parts(x), index, torch.ones(k)),
        "sparse_adamw_": (*(torch.ones(k) for _ in range(4)), x.bfloat16(), index, *numbers),
        "sparse_adamw_list_": (*(torch.ones(k) for _ in range(4)), parts(x.bfloat16()), index, *numbers),
    }[op]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("op", list(ops.schema.SCHEMAS))
def test_opcheck_passes(op: str, n: int) -> None:
    torch.library.opcheck(getattr(torch.ops.piece_ds, op).default, arguments(op, n), test_utils=TESTS)


def test_opcheck_passes_without_the_optional_sum() -> None:
    grad, _, square_sum, scale, count = arguments("accumulate_", 33)
    torch.library.opcheck(torch.ops.piece_ds.accumulate_.default, (grad, None, square_sum, scale, count))
    torch.library.opcheck(torch.ops.piece_ds.score.default, (None, square_sum, 1.0))


@pytest.mark.parametrize("op", list(ops.schema.SCHEMAS))
def test_compiled_without_graph_breaks_gives_the_same(op: str) -> None:
    """Some ops have a length that depends on the data, which the tracer must be allowed to leave open."""
    overload = getattr(torch.ops.piece_ds, op).default

    def call(*args: object) -> object:
        return overload(*args)

    torch._dynamo.reset()  # one code object serves every op: it would run into the limit of recompilations
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    plain, traced = arguments(op, 1023), arguments(op, 1023)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_equal(call(*plain), compiled(*traced))
    for first, second in zip(plain, traced, strict=True):
        assert_equal(first, second)


def test_the_public_function_of_an_op_compiles_without_graph_breaks() -> None:
    """load() has been called, so the wrapper has nothing to do that cannot be traced."""
    compiled = torch.compile(ops.score, fullgraph=True, backend="aot_eager")
    grad_sum, square_sum, lam = arguments("score", 1023)
    assert_equal(ops.score(grad_sum, square_sum, lam), compiled(grad_sum, square_sum, lam))


def parts(x: Tensor) -> list[Tensor]:
    """x in three tensors of memory of their own."""
    return [part.clone() for part in x.tensor_split(3)]


def assert_equal(first: object, second: object) -> None:
    if isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second
