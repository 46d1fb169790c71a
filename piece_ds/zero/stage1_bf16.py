"""Adapt stage 1 with bf16 parameters and fp32 gradient accumulation: DeepSpeed's BF16_Optimizer.

It keeps the whole reduced gradient of a group, in fp32, on every rank. Norm and clip are over all of it, and only the
step is partitioned. So the whole buffer is masked.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from piece_ds.runtime.overriding import override
from piece_ds.zero.adapter import Adapter, BoundGradients, Piece, pieces_between


class Stage1BF16(Adapter):
    """Adapter for BF16_Optimizer."""

    private_names = (
        "fp32_groups_gradients_flat",
        "fp32_groups_has_gradients",
        "fp32_groups_flat_partition",
        "bf16_groups",
        "real_dp_process_group",
        "clear_hp_grads",
    )

    replicated = True

    def _pieces(self, group: int) -> list[Piece]:
        pieces, offset = [], 0
        for param in self.optimizer.bf16_groups[group]:
            pieces.append(Piece(self.name_of[id(param)], 0, param.numel(), offset))
            offset += param.numel()
        return pieces

    def masters(self) -> list[tuple[Tensor, list[Piece]]]:
        result = []
        for group, master in enumerate(self.optimizer.fp32_groups_flat_partition):
            begin = dist.get_rank(group=self.optimizer.real_dp_process_group[group]) * master.numel()
            result.append((master, pieces_between(self._pieces(group), begin, begin + master.numel())))
        return result

    def bind(self, index: dict[str, Tensor]) -> None:
        self._bound = BoundGradients()
        for group in range(len(self.optimizer.bf16_groups)):
            self._bound.bind(group, self._pieces(group), index)

    def mask_gradients_(self) -> None:
        for group, grad in enumerate(self.optimizer.fp32_groups_gradients_flat):
            self._bound.mask_(group, grad)

    def gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        flats = self.optimizer.fp32_groups_gradients_flat
        return [(grad, self._pieces(group)) for group, grad in enumerate(flats)]

    def weights(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return whole groups, gathered, because masters are partitioned here but gradients are not. A collective."""
        result = []
        for group, master in enumerate(self.optimizer.fp32_groups_flat_partition):
            ranks = self.optimizer.real_dp_process_group[group]
            parts = [torch.empty_like(master) for _ in range(dist.get_world_size(group=ranks))]
            dist.all_gather(parts, master.detach(), group=ranks)
            result.append((torch.cat(parts), self._pieces(group)))
        return result

    def places(self) -> list[Piece]:
        return [piece for group in range(len(self.optimizer.bf16_groups)) for piece in self._pieces(group)]

    def set_gradient(self, grad: Tensor) -> None:
        self.optimizer.fp32_groups_gradients_flat[0][: grad.numel()].copy_(grad)
        self.optimizer.fp32_groups_has_gradients[0][0] = True

    def skip_nonfinite(self, note: Callable[[], None]) -> Callable[[], None]:
        """Report nonfinite steps, which the wrapper skips itself; return undo."""
        optimizer, original = self.optimizer, self.optimizer.clear_hp_grads

        def clear_hp_grads() -> None:
            if optimizer.overflow:
                note()
            original()

        return override(optimizer, "clear_hp_grads", clear_hp_grads)

    def local_backward(self) -> AbstractContextManager[None]:
        return self.engine.no_sync()

    def forget_backward(self) -> None:
        self.optimizer.clear_hp_grads()
        self.engine.zero_grad()
