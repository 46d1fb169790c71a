"""All Triton ops as a provider: op name -> function, and their registration for CUDA."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from piece_ds.kernels.accumulate import accumulate_
from piece_ds.kernels.accumulate_filter import accumulate_filter_
from piece_ds.kernels.apply_mask import apply_mask_, apply_mask_list_
from piece_ds.kernels.filter import filter_
from piece_ds.kernels.gather_add import gather_add_
from piece_ds.kernels.index_to_mask import index_to_mask
from piece_ds.kernels.mask_to_index import mask_to_index
from piece_ds.kernels.sampled_gradient import sampled_gradient_
from piece_ds.kernels.scatter_list import scatter_list_
from piece_ds.kernels.score import score
from piece_ds.kernels.score_histogram import score_histogram_
from piece_ds.kernels.select_above import select_above
from piece_ds.kernels.sparse_adamw import sparse_adamw_, sparse_adamw_list_
from piece_ds.ops.schema import NAMESPACE, SCHEMAS

OPS: dict[str, Callable[..., Any]] = {
    "accumulate_": accumulate_,
    "accumulate_filter_": accumulate_filter_,
    "score": score,
    "score_histogram_": score_histogram_,
    "filter_": filter_,
    "select_above": select_above,
    "index_to_mask": index_to_mask,
    "mask_to_index": mask_to_index,
    "apply_mask_": apply_mask_,
    "apply_mask_list_": apply_mask_list_,
    "scatter_list_": scatter_list_,
    "gather_add_": gather_add_,
    "sampled_gradient_": sampled_gradient_,
    "sparse_adamw_": sparse_adamw_,
    "sparse_adamw_list_": sparse_adamw_list_,
}


def register() -> None:
    """Register the ops as the kernels of CUDA tensors."""
    for name in SCHEMAS:
        torch.library.impl(f"{NAMESPACE}::{name}", "cuda", on_own_device(OPS[name]))


def on_own_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return function, made to run while its first tensor's device is the current one, on which Triton launches.

    Raises:
        RuntimeError: when called, if not all tensors are on that device.
    """

    @wraps(function)
    def call(*arguments: object) -> object:
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        device = tensors[0].device
        if any(tensor.device != device for tensor in tensors):
            raise RuntimeError(f"piece_ds: {function.__name__} expected every tensor on {device}")
        with torch.cuda.device(device):
            return function(*arguments)

    return call
