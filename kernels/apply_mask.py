"""apply_mask_: copy the selected entries aside, zero the gradient, write them back.

The first step gives the norm too.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import from_float, is_finite, load_position, positions_of_block, to_float
from piece_ds.kernels.launch import BLOCK, CHECKED_OPTIONS, DTYPES, OPTIONS, grid, num_blocks, require_vector
from piece_ds.kernels.runs import place_of, runs_of
from piece_ds.kernels.scatter_list import scatter_runs


@triton.jit(do_not_specialize=["limit"])
def _apply_mask_keep_kernel(
    grad_ptr,
    index_ptr,
    scale,
    kept_ptr,
    partial_ptr,
    num_nonfinite_ptr,
    limit,
    n_elements,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j, mask = positions_of_block(n_elements, BLOCK)
    position, inside = load_position(index_ptr, j, mask, limit)
    value = tl.load(grad_ptr + position, mask=inside, other=0.0)
    keep(value, j, mask, scale, kept_ptr, partial_ptr, num_nonfinite_ptr, SCALED)


@triton.jit(do_not_specialize=["num_runs", "total"])
def _apply_mask_keep_list_kernel(
    begins_ptr,
    addresses_ptr,
    num_runs,
    total,
    index_ptr,
    scale,
    kept_ptr,
    partial_ptr,
    num_nonfinite_ptr,
    n_elements,
    STEPS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j, mask = positions_of_block(n_elements, BLOCK)
    position = tl.load(index_ptr + j, mask=mask, other=0)
    element = kept_ptr.dtype.element_ty
    place, inside = place_of(position, mask, begins_ptr, addresses_ptr, num_runs, total, element, STEPS)
    value = tl.load(place, mask=inside, other=0.0)
    keep(value, j, mask, scale, kept_ptr, partial_ptr, num_nonfinite_ptr, SCALED)


@triton.jit
def keep(value, j, mask, scale, kept_ptr, partial_ptr, num_nonfinite_ptr, SCALED: tl.constexpr):
    """Copy entries aside; add up non-finite entries and squares if they are wanted."""
    if SCALED:
        value = from_float(to_float(value) * scale, value.dtype)
    tl.store(kept_ptr + j, value, mask=mask)
    x = to_float(value)
    if num_nonfinite_ptr is not None:
        num_bad = tl.sum((is_finite(x) == 0).to(tl.int32))
        tl.atomic_add(num_nonfinite_ptr, num_bad.to(tl.int64), mask=num_bad > 0, sem="relaxed")
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(x.to(tl.float64) * x.to(tl.float64)))  # no atomics: repeatable


@triton.jit
def _apply_mask_scatter_kernel(grad_ptr, index_ptr, kept_ptr, n_elements, BLOCK: tl.constexpr):
    j, mask = positions_of_block(n_elements, BLOCK)
    position = tl.load(index_ptr + j, mask=mask, other=0)
    tl.store(grad_ptr + position, tl.load(kept_ptr + j, mask=mask), mask=mask)


def apply_mask_(
    grad: Tensor, index: Tensor, scale: float, square_norm: Tensor | None, num_nonfinite: Tensor | None
) -> None:
    """Zero all but the selected entries of a gradient; see piece_ds.ops.apply_mask_."""
    n, k = grad.numel(), index.numel()
    require_vector("grad", grad, n, *DTYPES)
    require_vector("index", index, k, torch.int64)
    require_vector("square_norm", square_norm, 1, torch.float64)
    require_vector("num_nonfinite", num_nonfinite, 1, torch.int64)
    if k == 0:
        grad.zero_()
        return

    # Copy the selected entries aside; their norm comes on the way.
    kept, partial = room_for(grad, k, square_norm)
    _apply_mask_keep_kernel[grid(k)](
        grad, index, scale, kept, partial, num_nonfinite, n, k, scale != 1.0, BLOCK, **CHECKED_OPTIONS
    )
    if square_norm is not None and partial is not None:
        square_norm += partial.sum()
    grad.zero_()
    _apply_mask_scatter_kernel[grid(k)](grad, index, kept, k, BLOCK, **OPTIONS)


def apply_mask_list_(
    grads: Sequence[Tensor], index: Tensor, scale: float, square_norm: Tensor | None, num_nonfinite: Tensor | None
) -> None:
    """Zero all but the selected entries of several gradients; see piece_ds.ops.apply_mask_list_."""

    # One run of memory is as good as one tensor.
    k, runs = index.numel(), runs_of("grads", grads, index.device)
    # Nothing selected: every gradient becomes zero.
    if runs.flat is not None or k == 0:
        for grad in grads if runs.flat is None else [runs.flat]:
            apply_mask_(grad, index, scale, square_norm, num_nonfinite)
        return
    require_vector("index", index, k, torch.int64)
    require_vector("square_norm", square_norm, 1, torch.float64)
    require_vector("num_nonfinite", num_nonfinite, 1, torch.int64)

    # Copy the selected entries aside, zero all gradients, write them back.
    kept, partial = room_for(grads[0], k, square_norm)
    _apply_mask_keep_list_kernel[grid(k)](
        runs.begins,
        runs.addresses,
        runs.num_runs,
        runs.total,
        index,
        scale,
        kept,
        partial,
        num_nonfinite,
        k,
        runs.steps,
        scale != 1.0,
        BLOCK,
        **CHECKED_OPTIONS,
    )
    if square_norm is not None and partial is not None:
        square_norm += partial.sum()
    torch._foreach_zero_(list(grads))
    scatter_runs(runs, index, kept)


def room_for(grad: Tensor, k: int, square_norm: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return room for the entries copied aside and, if the norm is wanted, for one fp64 partial sum per program."""
    partial = None if square_norm is None else grad.new_empty(num_blocks(k), dtype=torch.float64)
    return grad.new_empty(k), partial
