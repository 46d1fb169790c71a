"""sparse_adamw_: one AdamW step of the selected elements, with new values written into the weight, in one pass."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from piece_ds.kernels.elements import bits_of, from_float, load_position, positions_of_block
from piece_ds.kernels.launch import BLOCK, CHECKED_OPTIONS, DTYPES, grid, require, require_vector
from piece_ds.kernels.runs import place_of, runs_of


@triton.jit(do_not_specialize=["limit"])
def _sparse_adamw_kernel(
    grad_ptr,
    value_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    weight_ptr,
    index_ptr,
    grad_scale,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    step_size,
    correction,
    limit,
    n_elements,
    WEIGHT_HOLDS_VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    j, mask = positions_of_block(n_elements, BLOCK)
    position, inside = load_position(index_ptr, j, mask, limit)
    place = weight_ptr + position
    numbers = (grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, correction)
    step_elements(grad_ptr, value_ptr, exp_avg_ptr, exp_avg_sq_ptr, place, j, mask, inside, numbers, WEIGHT_HOLDS_VALUE)


@triton.jit(do_not_specialize=["num_runs", "total"])
def _sparse_adamw_list_kernel(
    grad_ptr,
    value_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    weight_ptr,
    begins_ptr,
    addresses_ptr,
    num_runs,
    total,
    index_ptr,
    grad_scale,
    decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    step_size,
    correction,
    n_elements,
    STEPS: tl.constexpr,
    WEIGHT_HOLDS_VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step elements of a list of weights. weight_ptr is any of the weights: it gives their type."""
    j, mask = positions_of_block(n_elements, BLOCK)
    position = tl.load(index_ptr + j, mask=mask, other=0)
    element = weight_ptr.dtype.element_ty
    place, inside = place_of(position, mask, begins_ptr, addresses_ptr, num_runs, total, element, STEPS)
    numbers = (grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, correction)
    step_elements(grad_ptr, value_ptr, exp_avg_ptr, exp_avg_sq_ptr, place, j, mask, inside, numbers, WEIGHT_HOLDS_VALUE)


@triton.jit
def step_elements(
    grad_ptr,
    value_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    place,
    j,
    mask,
    inside,
    numbers,
    WEIGHT_HOLDS_VALUE: tl.constexpr,
):
    """Make one AdamW step of the elements j, and write their weights at place."""
    grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, correction = numbers
    element = place.dtype.element_ty
    # The scale holds both loss scaling and clipping.
    grad = tl.load(grad_ptr + j, mask=mask, other=0.0) * grad_scale
    old = tl.load(value_ptr + j, mask=mask, other=0.0)
    # Decoupled weight decay comes first, as in torch.optim.AdamW.
    value = old * decay
    first = tl.load(exp_avg_ptr + j, mask=mask, other=0.0)
    second = tl.load(exp_avg_sq_ptr + j, mask=mask, other=0.0)
    # Both moments in torch's form, so that roundings agree.
    first += (grad - first) * one_minus_beta1
    second = second * beta2 + (grad * grad) * one_minus_beta2
    denominator = tl.sqrt_rn(second) * correction + eps
    value -= tl.div_rn(first, denominator) * step_size
    tl.store(value_ptr + j, value, mask=mask)
    tl.store(exp_avg_ptr + j, first, mask=mask)
    tl.store(exp_avg_sq_ptr + j, second, mask=mask)
    # The fp32 value is the master; the weight is its rounding.
    after = from_float(value, element)
    if WEIGHT_HOLDS_VALUE:  # each write touches a memory line of its own: skip those that change nothing
        inside = inside & (bits_of(after) != bits_of(from_float(old, element)))
    tl.store(place, after, mask=inside)


def sparse_adamw_(
    grad: Tensor,
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    index: Tensor,
    grad_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    weight_holds_value: bool,
) -> None:
    """Make one AdamW step of the selected elements; see piece_ds.ops.sparse_adamw_."""
    require(step >= 1, f"sparse_adamw_ expected step >= 1, got {step}")
    k = index.numel()
    require_vector("weight", weight, weight.numel(), *DTYPES)
    require_vector("index", index, k, torch.int64)
    for name, tensor in (("grad", grad), ("value", value), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        require_vector(name, tensor, k, torch.float32)
    if k == 0:
        return
    _sparse_adamw_kernel[grid(k)](
        grad,
        value,
        exp_avg,
        exp_avg_sq,
        weight,
        index,
        *numbers_of(grad_scale, lr, beta1, beta2, eps, weight_decay, step),
        weight.numel(),
        k,
        weight_holds_value,
        BLOCK,
        **CHECKED_OPTIONS,
    )


def numbers_of(
    grad_scale: float, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int
) -> tuple[float, ...]:
    """Return a step's numbers as the kernels take them, in fp64.

    Triton rounds each to fp32 once when it passes them.
    """
    # In fp64 on the host: 1 - beta^step loses digits in fp32.
    step_size, correction = lr / (1.0 - beta1**step), 1.0 / math.sqrt(1.0 - beta2**step)
    decay = 1.0 - lr * weight_decay
    return grad_scale, decay, 1.0 - beta1, beta2, 1.0 - beta2, eps, step_size, correction


def sparse_adamw_list_(
    grad: Tensor,
    value: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Sequence[Tensor],
    index: Tensor,
    grad_scale: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    weight_holds_value: bool,
) -> None:
    """Make one AdamW step of selected elements of many weights; see piece_ds.ops.sparse_adamw_list_."""
    require(step >= 1, f"sparse_adamw_list_ expected step >= 1, got {step}")

    # Check the arguments; an empty selection has nothing to step.
    k, runs = index.numel(), runs_of("weights", weights, index.device)
    require_vector("index", index, k, torch.int64)
    for name, tensor in (("grad", grad), ("value", value), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        require_vector(name, tensor, k, torch.float32)
    if k == 0:
        return
    _sparse_adamw_list_kernel[grid(k)](
        grad,
        value,
        exp_avg,
        exp_avg_sq,
        weights[0],
        runs.begins,
        runs.addresses,
        runs.num_runs,
        runs.total,
        index,
        *numbers_of(grad_scale, lr, beta1, beta2, eps, weight_decay, step),
        k,
        runs.steps,
        weight_holds_value,
        BLOCK,
        **CHECKED_OPTIONS,
    )
