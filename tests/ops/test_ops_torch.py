"""The ops are good citizens of torch: opcheck passes, and they trace under torch.compile(fullgraph=True)."""

import pytest
import torch
from torch import Tensor

from piece_ds import ops

SIZES = [0, 1, 33, 1023]
TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def arguments(op: str, n: int) -> tuple:
    """Fresh arguments of an op for n elements."""
    x = torch.linspace(0, 3, n)
    index = torch.arange(0, n, 3)
    return {
        "accumulate_": (x.bfloat16(), torch.zeros(n), torch.ones(n), 0.5, torch.zeros(1, dtype=torch.int64)),
        "score": (x - 1, x.clone(), 1.0),
        "digit_histogram_": (torch.zeros(2048, dtype=torch.int64), x, 20, 11, 0),
        "index_to_mask": (index, n),
        "mask_to_index": (torch.arange(n).to(torch.uint8),),
        "apply_mask_": (x, index),
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
    """mask_to_index has a length that depends on the data, which the tracer must be allowed to leave open."""
    call = getattr(ops, op)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    plain, traced = arguments(op, 1023), arguments(op, 1023)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert_equal(call(*plain), compiled(*traced))
    for first, second in zip(plain, traced, strict=True):
        assert_equal(first, second)


def test_reference_is_registered_for_every_op_on_cpu_and_cuda() -> None:
    for op in ops.schema.SCHEMAS:
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"piece_ds::{op}", key)


def assert_equal(first: object, second: object) -> None:
    if isinstance(first, Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second
