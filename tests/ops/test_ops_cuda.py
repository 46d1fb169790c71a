"""Every op gives on a GPU the bits that it gives on the CPU, where the numpy oracle holds it."""

import pytest
import torch
from torch import Tensor

from piece_ds import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SIZES = [0, 1, 31, 33, 10_007, 1 << 20]


def values(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-20, 15, (n,), generator=generator)
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 1e-39])[:n]
    x[: special.numel()] = special
    return x.to(dtype)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert got.device.type == "cuda"
    torch.testing.assert_close(got.cpu().view(torch.int32), want.view(torch.int32), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1 / 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_accumulate(n: int, dtype: torch.dtype, scale: float) -> None:
    results = []
    for device in ("cpu", "cuda"):
        sums = [torch.full((n,), 0.25, device=device) for _ in range(2)]
        count = torch.zeros(1, dtype=torch.int64, device=device)
        ops.accumulate_(values(n, dtype).to(device), *sums, scale, count)
        results.append((*sums, count))
    (cpu_sum, cpu_square, cpu_count), (gpu_sum, gpu_square, gpu_count) = results
    assert_same_bits(gpu_sum, cpu_sum)
    assert_same_bits(gpu_square, cpu_square)
    assert int(gpu_count) == int(cpu_count)


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("n", SIZES)
def test_score_and_histogram(n: int, with_sum: bool) -> None:
    grad_sum, square_sum = values(n), values(n).abs()
    scores = ops.score(grad_sum if with_sum else None, square_sum)
    on_gpu = ops.score(grad_sum.cuda() if with_sum else None, square_sum.cuda())
    assert_same_bits(on_gpu, scores)
    counts, gpu_counts = torch.zeros(2048, dtype=torch.int64), torch.zeros(2048, dtype=torch.int64, device="cuda")
    ops.score_histogram_(counts, None, scores, 1.0, 20, 11, 0)
    ops.score_histogram_(gpu_counts, None, on_gpu, 1.0, 20, 11, 0)
    assert torch.equal(gpu_counts.cpu(), counts)


@pytest.mark.parametrize("n", [1, 31, 33, 10_007, 1 << 20])
def test_masks(n: int) -> None:
    index = torch.arange(0, n, 7)
    bits = ops.index_to_mask(index, n)
    assert torch.equal(ops.index_to_mask(index.cuda(), n).cpu(), bits)
    assert torch.equal(ops.mask_to_index(bits.cuda()).cpu(), index)
    grad = values(n)
    on_gpu = grad.cuda()
    ops.apply_mask_(grad, index)
    ops.apply_mask_(on_gpu, index.cuda())
    assert_same_bits(on_gpu, grad)
