"""Both CUDA providers give on a GPU the bits of the reference on the CPU, where the numpy oracle holds it.

The same cases run without a GPU, interpreted and emulated (test_gpu_kernels.py); what is new here is the hardware:
warps, atomics, streams, memory.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gpu_cases import LARGE, SIZES, Case, cases, run_cases, values

from piece_ds import ops
from piece_ds.ops.schema import SCHEMAS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROVIDERS = ["cuda", "triton"]


# Triton's lists are one call a tensor of an op that has all cases of its own; each takes seconds of launches.
LISTS_OF_TRITON = 7  # cases between two that run; no divisor of what alternates


@pytest.fixture(scope="module", params=PROVIDERS)
def provider(request: pytest.FixtureRequest) -> Callable[[str], Callable[..., Any]]:
    """Op name -> function on CUDA tensors, of each provider."""
    if request.param == "triton":
        from piece_ds.kernels.provider import OPS, on_own_device

        return lambda op: on_own_device(OPS[op])
    assert ops.load("cuda") == "cuda", "these tests choose the provider themselves: unset PIECE_DS_BACKEND"
    return lambda op: getattr(torch.ops.piece_ds, op).default


@pytest.fixture(scope="module")
def every_case() -> dict[str, list[Case]]:
    by_op: dict[str, list[Case]] = {op: [] for op in SCHEMAS}
    for case in cases([*SIZES, *LARGE]):
        by_op[case.op].append(case)
    return by_op


@pytest.mark.parametrize("op", list(SCHEMAS))
def test_every_case_equals_the_reference(
    op: str,
    provider: Callable[[str], Callable[..., Any]],
    every_case: dict[str, list[Case]],
    request: pytest.FixtureRequest,
) -> None:
    every = LISTS_OF_TRITON if op.endswith("_list_") and "triton" in request.node.name else 1
    number, failures = run_cases(provider, every_case[op][::every], "cuda")[op]
    assert number >= 15
    assert not failures, f"{len(failures)} of {number}:\n" + "\n".join(failures[:5])


def cuda_index(n: int, stride: int) -> torch.Tensor:
    return torch.arange(0, n, stride, device="cuda")


def test_sums_of_floats_have_one_order(provider: Callable[[str], Callable[..., Any]]) -> None:
    """The same bits in every one of 20 runs, also while another stream keeps the device busy."""
    n = 1 << 20
    grad, index = torch.randn(n, device="cuda"), cuda_index(n, 3)
    left, right = torch.randn(1000, 256, device="cuda"), torch.randn(1000, 512, device="cuda")
    norms, totals = set(), set()
    for _ in range(20):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.randn(1 << 22, device="cuda").sort()
        norm, count = torch.zeros(1, dtype=torch.float64, device="cuda"), torch.zeros(1).long().cuda()
        provider("apply_mask_")(grad.clone(), index, 1.0, norm, count)
        total = torch.zeros(1000, device="cuda")
        provider("sampled_gradient_")(left, right, cuda_index(1000 * 131, 131), 1.0, total)
        norms.add(norm.item())
        totals.add(total.cpu().numpy().tobytes())
    assert len(norms) == 1
    assert len(totals) == 1


def test_work_is_on_the_current_stream(provider: Callable[[str], Callable[..., Any]]) -> None:
    """A result is ready for what follows on the same stream, and waits for what went before."""
    n = 1 << 22
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        grad = torch.ones(n, device="cuda")
        square_sum, count = torch.zeros(n, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        provider("accumulate_")(grad, None, square_sum, 2.0, count)
        result = square_sum.sum()
    stream.synchronize()
    assert result.item() == 4.0 * n


def test_selection_can_be_captured_in_a_graph(provider: Callable[[str], Callable[..., Any]]) -> None:
    """Nothing but ops whose result has an unknown length may wait for the device."""
    n = 100_003
    grad, square_sum = values(n).cuda(), torch.zeros(n, device="cuda")
    count, histogram = torch.zeros(1).long().cuda(), torch.zeros(2048).long().cuda()
    room = torch.zeros(n, device="cuda"), torch.zeros(n).long().cuda(), torch.zeros(1).long().cuda()

    def step() -> None:
        provider("accumulate_")(grad, None, square_sum, 1.0, count)
        provider("score_histogram_")(histogram, None, square_sum, 1.0, 20, 11, 0, 1, 1)
        provider("filter_")(None, square_sum, 1.0, 0.5, 0, *room)

    step()  # compiles
    expected = square_sum.clone(), histogram.clone(), room[2].clone()
    for tensor in (square_sum, histogram, room[2]):
        tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(histogram, expected[1])
    assert torch.equal(room[2], expected[2])
    assert torch.equal(square_sum, expected[0])


@pytest.mark.parametrize("name", PROVIDERS)
def test_positions_outside_stop_the_kernel(name: str) -> None:
    """In a process of its own: a failed assertion on the device ends every use of it."""
    program = """import torch
from piece_ds import ops
torch.set_default_device("cuda")
ops.gather_add_(torch.ones(4), torch.tensor([4]), 1.0, torch.ones(1))
torch.cuda.synchronize()
"""
    environment = {**os.environ, "PIECE_DS_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert "lies outside of its tensor" in done.stdout + done.stderr


def test_tensors_of_another_device_are_refused(provider: Callable[[str], Callable[..., Any]]) -> None:
    with pytest.raises(RuntimeError, match="cuda:0"):
        provider("gather_add_")(torch.ones(4, device="cuda"), torch.tensor([1]), 1.0, torch.ones(1, device="cuda"))


@pytest.fixture(scope="module")
def beyond_32_bits() -> tuple[torch.Tensor, int]:
    """More than 2^32 scores, few of them not zero, of which some lie beyond 2^32; 17 GB."""
    n = (1 << 32) + 12_345
    if torch.cuda.get_device_properties(0).total_memory < 3 * 4 * n:
        pytest.skip("needs a GPU with 52 GB of memory")
    scores = torch.zeros(n, device="cuda")
    scores[:: 1 << 24] = 1.0
    scores[-1] = 2.0
    return scores, n


def test_more_elements_than_32_bits_count(
    provider: Callable[[str], Callable[..., Any]], beyond_32_bits: tuple[torch.Tensor, int]
) -> None:
    scores, n = beyond_32_bits
    wanted = [*range(0, n, 1 << 24), n - 1]
    count = torch.zeros(1).long().cuda()
    room = torch.zeros(1000, device="cuda"), torch.zeros(1000).long().cuda(), count.clone()
    provider("filter_")(None, scores, 1.0, 0.5, 0, *room)
    assert sorted(room[1][: int(room[2])].tolist()) == wanted
    index = provider("select_above")(None, scores, 1.0, 0x3F800000, 100)
    assert index.tolist() == [*wanted[:100], n - 1]
    bits = provider("index_to_mask")(index, n)
    assert torch.equal(provider("mask_to_index")(bits), index)
    histogram = torch.zeros(2048).long().cuda()
    provider("score_histogram_")(histogram, None, scores, 1.0, 20, 11, 0, 1, 1)
    assert int(histogram.sum()) == n
    assert int(histogram[0x3F800000 >> 20]) == len(wanted) - 1
    grad = scores.to(torch.bfloat16)
    provider("apply_mask_")(grad, index, 1.0, torch.zeros(1).double().cuda(), count)
    assert bool((grad[index] != 0).all())
    assert int((grad != 0).sum()) == index.numel()  # torch.nonzero stops at 2^31 elements
