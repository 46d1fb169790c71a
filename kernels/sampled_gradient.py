"""sampled_gradient_: selected entries of grad_output^T input, each a dot product of two columns over the tokens.

Columns are strided: each read of 32 bytes has 2 or 4 useful ones. So torch transposes both matrices, some tokens at a
time, and a dot product then reads two runs of consecutive elements. csrc/cuda/sampled_gradient.cu counts the bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import load_position, positions_of_block, to_float
from piece_ds.kernels.launch import CHECKED_OPTIONS, DTYPES, grid, require, require_vector

# Entries per program, and tokens that it reads of each at a time.
ENTRIES, TOKENS = 8, 256
# Both transposed matrices of one round fit into the L2 of a large GPU. A round has at least 64 tokens.
SCRATCH_BYTES, MIN_TOKENS = 32 << 20, 64


@triton.jit(do_not_specialize=["limit"])
def _sampled_gradient_kernel(
    outputs_ptr,
    inputs_ptr,
    index_ptr,
    scale,
    total_ptr,
    num_tokens,
    num_inputs,
    limit,
    n_elements,
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    j, mask = positions_of_block(n_elements, ENTRIES)
    entry, inside = load_position(index_ptr, j, mask, limit)
    row = outputs_ptr + entry // num_inputs * num_tokens
    column = inputs_ptr + entry % num_inputs * num_tokens
    sums = tl.zeros([ENTRIES, TOKENS], dtype=tl.float32)
    # Sums in fp32, one per lane, added up only once at the end.
    for first in range(0, num_tokens, TOKENS):
        token = first + tl.arange(0, TOKENS)
        wanted = inside[:, None] & (token < num_tokens)[None, :]
        a = to_float(tl.load(row[:, None] + token[None, :], mask=wanted, other=0.0))
        b = to_float(tl.load(column[:, None] + token[None, :], mask=wanted, other=0.0))
        sums += a * b
    result = tl.sum(sums, axis=1) * scale
    tl.store(total_ptr + j, tl.load(total_ptr + j, mask=mask, other=0.0) + result, mask=mask)


def sampled_gradient_(grad_output: Tensor, input: Tensor, index: Tensor, scale: float, total: Tensor) -> None:
    """Add selected entries of a weight's gradient to total; see piece_ds.ops.sampled_gradient_."""

    # Check shapes, dtypes and lengths.
    k = index.numel()
    require(
        grad_output.dim() == 2 and input.dim() == 2 and grad_output.shape[0] == input.shape[0],
        "sampled_gradient_ expected [tokens, out] and [tokens, in]",
    )
    require(
        input.dtype in DTYPES and grad_output.dtype == input.dtype,
        "grad_output and input must have the same dtype, one of float32, bfloat16 and float16",
    )
    require_vector("index", index, k, torch.int64)
    require_vector("total", total, k, torch.float32)

    # Rounds of tokens, small enough for the scratch memory.
    tokens, width = input.shape
    bytes_per_token = input.element_size() * (width + grad_output.shape[1])
    step = max(MIN_TOKENS, SCRATCH_BYTES // max(1, bytes_per_token) // MIN_TOKENS * MIN_TOKENS)
    for first in range(0, tokens if k > 0 else 0, step):
        rows = grad_output[first : first + step].t().contiguous()
        columns = input[first : first + step].t().contiguous()
        _sampled_gradient_kernel[grid(k, ENTRIES)](
            rows,
            columns,
            index,
            scale,
            total,
            rows.shape[1],
            width,
            grad_output.shape[1] * width,
            k,
            ENTRIES,
            TOKENS,
            **CHECKED_OPTIONS,
        )
