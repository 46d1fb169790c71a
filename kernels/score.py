"""score: |sum| / sqrt(square sum + lam). One read of the sums and one write."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import load_score, positions_of_block
from piece_ds.kernels.launch import BLOCK, OPTIONS, grid, require_sums


@triton.jit
def _score_kernel(sum_ptr, square_ptr, out_ptr, lam, n_elements, WITH_SUM: tl.constexpr, BLOCK: tl.constexpr):
    position, mask = positions_of_block(n_elements, BLOCK)
    tl.store(out_ptr + position, load_score(sum_ptr, square_ptr, lam, position, mask, WITH_SUM), mask=mask)


def score(grad_sum: Tensor | None, square_sum: Tensor, lam: float) -> Tensor:
    """Return the scores of all elements; see piece_ds.ops.score."""
    require_sums(grad_sum, square_sum)
    out, n = torch.empty_like(square_sum), square_sum.numel()
    if n > 0:
        _score_kernel[grid(n)](grad_sum, square_sum, out, lam, n, grad_sum is not None, BLOCK, **OPTIONS)
    return out
