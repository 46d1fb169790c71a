"""scatter_list_: write values to positions of many tensors in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import positions_of_block
from piece_ds.kernels.launch import BLOCK, CHECKED_OPTIONS, grid, require_vector
from piece_ds.kernels.runs import Runs, place_of, runs_of


@triton.jit(do_not_specialize=["num_runs", "total"])
def _scatter_list_kernel(
    begins_ptr,
    addresses_ptr,
    num_runs,
    total,
    index_ptr,
    kept_ptr,
    n_elements,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j, mask = positions_of_block(n_elements, BLOCK)
    position = tl.load(index_ptr + j, mask=mask, other=0)
    element = kept_ptr.dtype.element_ty
    place, inside = place_of(position, mask, begins_ptr, addresses_ptr, num_runs, total, element, STEPS)
    tl.store(place, tl.load(kept_ptr + j, mask=mask), mask=inside)


def scatter_list_(weights: Sequence[Tensor], index: Tensor, values: Tensor) -> None:
    """Write values to positions of many tensors; see piece_ds.ops.scatter_list_."""
    k, runs = index.numel(), runs_of("weights", weights, index.device)
    require_vector("index", index, k, torch.int64)
    if k > 0:
        # The type of the weights; an empty list of positions needs none.
        require_vector("values", values, k, weights[0].dtype)
        scatter_runs(runs, index, values)


def scatter_runs(runs: Runs, index: Tensor, values: Tensor) -> None:
    """Write values[j] to position index[j] of the list. There must be at least one value."""
    k = index.numel()
    table = (runs.begins, runs.addresses, runs.num_runs, runs.total)
    _scatter_list_kernel[grid(k)](*table, index, values, k, runs.steps, BLOCK, **CHECKED_OPTIONS)
