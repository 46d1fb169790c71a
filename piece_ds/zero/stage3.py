"""Adapt stage 3: each rank r holds the chunk [r c, (r + 1) c) of every parameter's reduced gradient.

Without optimizer offload the chunks wait, side by side, until the step. With it, norms are taken while chunks are
copied out during backward. So each chunk is masked on arrival instead.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.runtime.overriding import override
from piece_ds.state.partition import partition_of
from piece_ds.zero.adapter import Adapter, BoundGradients, Piece


class Stage3(Adapter):
    """Adapter for DeepSpeedZeroOptimizer_Stage3."""

    private_names = (
        "averaged_gradients",
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "offload_optimizer",
        "partition_grads",
        "grad_partitions_flat_buffer",
        "ipg_buckets",
        "_get_param_partition_rank",
        "_offload_boundary_param_ids",
        "_update_scale",
    )

    def _piece(self, param: nn.Parameter, offset: int = 0) -> Piece:
        owner = self.optimizer._get_param_partition_rank(param)
        num_ranks = -(-param.ds_numel // param.partition_numel())

        # A rank beyond the parameter's last chunk owns nothing.
        part = partition_of(param.ds_numel, owner, num_ranks) if owner < num_ranks else partition_of(0, 0, 1)
        return Piece(self.name_of[id(param)], part.start, part.numel, offset)

    def masters(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return each sub-group's chunks side by side. The last rank's padding has a place too."""
        result = []
        for params, master in zip(self.optimizer.fp16_groups, self.optimizer.fp32_partitioned_groups_flat, strict=True):
            pieces, offset = [], 0
            for param in params:
                pieces.append(self._piece(param, offset))
                offset += param.partition_numel()  # the last rank's padding has a place too
            result.append((master, pieces))
        return result

    def bind(self, index: dict[str, Tensor]) -> None:
        self._bound = BoundGradients()
        for group, (_, pieces) in enumerate(self.masters()):
            self._bound.bind(group, pieces, index)

        # With offload, chunks are masked one by one, so each parameter has a selection of its own.
        for params in self.optimizer.fp16_groups if self.optimizer.offload_optimizer else ():
            for param in params:
                self._bound.bind(self.name_of[id(param)], [self._piece(param)], index)

    def mask_gradients_(self) -> None:
        if self.optimizer.offload_optimizer:
            return  # done on arrival
        for group in range(len(self.optimizer.fp16_groups)):
            self._bound.mask_all_(group, list(self.optimizer.averaged_gradients[group]))

    def gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        return [
            (grad.view(-1), [self._piece(param)])
            for group, params in enumerate(self.optimizer.fp16_groups)
            for param, grad in zip(params, self.optimizer.averaged_gradients[group], strict=True)
        ]

    def install_mask(self) -> Callable[[], None]:
        """Mask at the accumulation boundary or, with optimizer offload, each chunk as it arrives; return remove."""
        if not self.optimizer.offload_optimizer:
            return super().install_mask()

        # Mask each chunk before DeepSpeed takes its norm.
        original = self.optimizer.partition_grads

        def partition_grads(params: list[nn.Parameter], grads: list[Tensor]) -> Any:
            for param, grad in zip(params, grads, strict=True):
                self._bound.mask_(self.name_of[id(param)], grad)
            return original(params, grads)

        return override(self.optimizer, "partition_grads", partition_grads)

    def set_gradient(self, grad: Tensor) -> None:
        """Set this rank's chunk of the gradient, in every place where DeepSpeed will read it."""
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import safe_set_local_grad

        # The values are the only parameter.
        ((param, *_), *_) = self.optimizer.fp16_groups
        piece = self._piece(param)
        own = torch.zeros(param.partition_numel(), dtype=grad.dtype, device=grad.device)
        own[: piece.numel] = grad[piece.start : piece.start + piece.numel]
        # Where the overflow check looks; without optimizer offload norm and step look there too.
        self.optimizer.grad_partitions_flat_buffer[: own.numel()].copy_(own)
        safe_set_local_grad(param, own)
        if not get_accelerator().resolves_data_dependency():  # the overflow check reads on a stream of its own
            self.optimizer.reduce_and_partition_stream.wait_stream(get_accelerator().current_stream())

    def bypass_reduction(self) -> Callable[[], None]:
        """Do nothing. Stage 3 reduces what its own hooks have seen, and its epilogue makes what the step needs."""
        return lambda: None

    def local_backward(self) -> AbstractContextManager[None]:
        return self.engine.coalesce_grad_reduction()

    def forget_backward(self) -> None:
        """Drop gradients, buckets and, with offload, the buffers that hold gradients on the CPU."""
        optimizer = self.optimizer
        optimizer.zero_grad()

        # Everything that a backward leaves behind: gradients, buckets, and offload's copies.
        optimizer.averaged_gradients = {}
        optimizer._offload_boundary_param_ids = set()
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()
        if optimizer.offload_optimizer:
            optimizer.reset_cpu_buffers()
        optimizer.grad_partitions_flat_buffer.zero_()

    def abandon_backward(self) -> None:
        """Restore the state as forget_backward() does, also if a forward or backward broke off.

        Gathered parameters are released, and DeepSpeed traces the order of modules anew.
        """
        self.engine.empty_partition_cache()
        coordinator = self.optimizer.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()
        coordinator.reset_step()
        self.forget_backward()
