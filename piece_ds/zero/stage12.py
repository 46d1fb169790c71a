"""Adapt stages 1 and 2 (DeepSpeedZeroOptimizer): each rank has a flat partition of each group's reduced gradient.

Without offload the partition is a list of tensors, padding included. With optimizer offload it is the fp32 gradient of
the master on the CPU. DeepSpeed took per-parameter norms of it during backward, so masking takes them again.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from piece_ds.runtime.overriding import override
from piece_ds.zero.adapter import Adapter, BoundGradients, Piece, pieces_between


class Stage12(Adapter):
    """Adapter for DeepSpeedZeroOptimizer."""

    private_names = (
        "averaged_gradients",
        "all_grad_tensors",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "partition_size",
        "params_in_partition",
        "get_param_id",
        "cpu_offload",
        "micro_step_id",
        "_update_scale",
    )

    def _partition(self, group: int) -> list[Piece]:
        """Return the parameters' places in this rank's partition of a group."""
        params = self.optimizer.round_robin_bit16_groups[group]
        offsets = self.optimizer.round_robin_bit16_offsets[group]
        pieces = [Piece(self.name_of[id(p)], 0, p.numel(), o) for p, o in zip(params, offsets, strict=True)]
        size = int(self.optimizer.partition_size[group])
        begin = dist.get_rank(group=self.optimizer.real_dp_process_group[group]) * size
        return pieces_between(pieces, begin, begin + size)

    def masters(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return each group's partition of the fp32 masters."""
        return [(m, self._partition(i)) for i, m in enumerate(self.optimizer.single_partition_of_fp32_groups)]

    def bind(self, index: dict[str, Tensor]) -> None:
        self._bound = BoundGradients()
        for group in range(len(self.optimizer.round_robin_bit16_groups)):
            self._bound.bind(group, self._partition(group), index)

    def mask_gradients_(self) -> None:
        for group in range(len(self.optimizer.round_robin_bit16_groups)):
            if self.optimizer.cpu_offload:
                self._mask_offloaded_(group)
            else:
                self._bound.mask_all_(group, list(self.optimizer.averaged_gradients[group]))

    def gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return the tensors of each group's partition, padding included."""
        result = []
        for group in range(len(self.optimizer.round_robin_bit16_groups)):
            partition, offset = self._partition(group), 0
            for grad in self.optimizer.averaged_gradients[group]:
                result.append((grad.view(-1), pieces_between(partition, offset, offset + grad.numel())))
                offset += grad.numel()
        return result

    def _mask_offloaded_(self, group: int) -> None:
        self.optimizer._wait_for_offload_copies()
        grad = self.optimizer.single_partition_of_fp32_groups[group].grad
        self._bound.mask_(group, grad)

        # The norms of backward included unselected entries.
        for param in self.optimizer.params_in_partition[group]:
            param_id = self.optimizer.get_param_id(param)
            if param_id in self.optimizer.norm_for_param_grads:
                _, _, offset, numel = self.optimizer.grad_position[param_id]
                norm = grad.view(-1)[offset : offset + numel].double().norm(2)
                self.optimizer.norm_for_param_grads[param_id] = norm

    def set_gradient(self, grad: Tensor) -> None:
        """Set this rank's partition of the gradient.

        With offload also what backward would have found: overflow and norm.
        """
        optimizer = self.optimizer

        # This rank's part, zeros in the padding. The values are the only parameter, hence group 0.
        own = torch.zeros(int(optimizer.partition_size[0]), dtype=grad.dtype, device=grad.device)
        for piece in self._partition(0):
            own[piece.offset : piece.offset + piece.numel] = grad[piece.start : piece.start + piece.numel]
        if not optimizer.cpu_offload:
            optimizer.averaged_gradients[0] = [own]
            return

        # Offload: the gradient lies with the master.
        optimizer.single_partition_of_fp32_groups[0].grad.view(-1).copy_(own)
        optimizer.local_overflow = not bool(own.isfinite().all())  # found during backward otherwise, as is the norm
        for param in optimizer.params_in_partition[0]:
            optimizer.norm_for_param_grads[optimizer.get_param_id(param)] = own.double().norm(2)

    def skip_nonfinite(self, note: Callable[[], None]) -> Callable[[], None]:
        """Skip nonfinite steps; return undo.

        In bf16 DeepSpeed does not look at the norm unless it checks for overflow, which is a pass over the gradient.
        Here it looks at the norm without that pass. If it is told to take no norm, the pass stays.
        """
        optimizer, undo = self.optimizer, super().skip_nonfinite(note)
        if getattr(optimizer, "check_grad_overflow", True):  # there has not always been a choice
            return undo

        # Ask for the check, and leave out its pass over the gradient if there is a norm to look at.
        optimizer.check_grad_overflow = True
        unasked = None
        if getattr(optimizer, "compute_grad_norm", True):
            unasked = override(optimizer, "check_overflow", lambda **kwargs: None)

        def undo_all() -> None:
            optimizer.check_grad_overflow = False
            if unasked is not None:
                unasked()
            undo()

        return undo_all

    def local_backward(self) -> AbstractContextManager[None]:
        return self.engine.coalesce_grad_reduction()

    def forget_backward(self) -> None:
        """Drop gradients, micro-step count and, with offload, the buffers that hold gradients on the CPU."""
        optimizer = self.optimizer
        optimizer.zero_grad()
        optimizer.micro_step_id = type(self)._initial_micro_step_id()
        # A gradient partition left over would be accumulated onto by the next backward.
        for group in list(optimizer.averaged_gradients):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        optimizer._release_preflattened_grad_buffers()
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()

    @staticmethod
    def _initial_micro_step_id() -> int:
        from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

        return INITIAL_MICRO_STEP_ID
