"""Adapt stage 0: every rank has whole gradients in p.grad, whether DeepSpeed wraps the optimizer or not."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from piece_ds.runtime.overriding import override
from piece_ds.state.selected_values import PARAMETER_NAME
from piece_ds.zero.adapter import Adapter, BoundGradients, Piece


class Stage0(Adapter):
    """Adapter for stage 0.

    In fp32 the bare optimizer steps the parameters themselves. In bf16 DeepSpeed wraps it: FP16_Optimizer keeps one
    flat master a group, FP16_UnfusedOptimizer one master a parameter.
    """

    replicated = True
    _has_norm = False  # of the gradient as it will be applied

    def masters(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return the parameters themselves in fp32, else the wrapper's masters."""
        flat_masters = getattr(self.optimizer, "fp32_groups_flat", None)
        if flat_masters is not None:
            return [(m, self._flat_pieces(g)) for m, g in zip(flat_masters, self.optimizer.fp16_groups, strict=True)]
        pairs = self._unfused_pairs()
        return [(m, [Piece(self.name_of[id(p)], 0, p.numel(), 0)]) for m, p in pairs]

    def _flat_pieces(self, group: list[torch.nn.Parameter]) -> list[Piece]:
        pieces, offset = [], 0
        for param in group:
            pieces.append(Piece(self.name_of[id(param)], 0, param.numel(), offset))
            offset += param.numel()
        return pieces

    def _unfused_pairs(self) -> list[tuple[Tensor, torch.nn.Parameter]]:
        """Return (master, parameter) pairs; in fp32 they are the same tensor."""
        if hasattr(self.optimizer, "fp32_groups"):
            groups = zip(self.optimizer.fp32_groups, self.optimizer.fp16_groups, strict=True)
            return [pair for masters, params in groups for pair in zip(masters, params, strict=True)]
        return [(p, p) for group in self.optimizer.param_groups for p in group["params"]]

    def prepare(self) -> None:
        """Reset masters and moments: FP16_(Unfused)Optimizer steps once with zero gradients when it is built.

        With weight decay that step has moved the masters.
        """
        if hasattr(self.optimizer, "fp32_groups_flat"):
            self.optimizer.refresh_fp32_params()
        elif hasattr(self.optimizer, "fp32_groups"):
            for master, param in self._unfused_pairs():
                master.data.copy_(param.data)
        else:
            return
        self.engine.basic_optimizer.state.clear()

    def bind(self, index: dict[str, Tensor]) -> None:
        self._params = [p for p in self.engine.module.parameters() if p.requires_grad]
        self._bound = BoundGradients()
        self._by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}

        # One selection a parameter, for a boundary at which some have no gradient.
        for param in self._params:
            name = self.name_of[id(param)]
            self._bound.bind(name, [Piece(name, 0, param.numel(), 0)], index)
            self._by_dtype.setdefault(param.dtype, []).append(param)

        # One selection a dtype, for the usual boundary: one call masks all gradients.
        for dtype, params in self._by_dtype.items():
            pieces, offset = [], 0
            for param in params:
                pieces.append(Piece(self.name_of[id(param)], 0, param.numel(), offset))
                offset += param.numel()
            self._bound.bind(dtype, pieces, index)

    def mask_gradients_(self) -> None:
        """Mask p.grad of every parameter, and report the norm of what is left."""
        for dtype, params in self._by_dtype.items():
            grads = [param.grad for param in params if param.grad is not None]
            if len(grads) == len(params):
                self._bound.mask_all_(dtype, grads)
                continue
            for param in params:  # one that this loss does not use has none
                if param.grad is not None:
                    self._bound.mask_(self.name_of[id(param)], param.grad)
        self._report_norm([param.grad for param in self._params if param.grad is not None])

    def gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        params = [p for p in self.engine.module.parameters() if p.requires_grad and p.grad is not None]
        return [(p.grad.view(-1), [Piece(self.name_of[id(p)], 0, p.numel(), 0)]) for p in params]

    def refresh_norm(self) -> None:
        self._report_norm([grad for grad, _ in self.gradients()])

    def skip_nonfinite(self, note: Callable[[], None]) -> Callable[[], None]:
        """Skip nonfinite steps; return undo. The wrapper skips them itself, a bare optimizer must be made to."""
        self._note = note
        if self.optimizer is self.engine.basic_optimizer:
            return self._skip_bare()
        optimizer, original = self.optimizer, self.optimizer._skip_invalid_grad_norm

        def _skip_invalid_grad_norm() -> Any:
            note()
            return original()

        return override(optimizer, "_skip_invalid_grad_norm", _skip_invalid_grad_norm)

    def _skip_bare(self) -> Callable[[], None]:
        """Skip steps of a bare torch optimizer. It gets the flag `overflow` that the engine reads on its wrappers."""
        optimizer, step = self.optimizer, self.optimizer.step
        optimizer.overflow = False

        def checked_step(*args: Any, **kwargs: Any) -> Any:
            return None if optimizer.overflow else step(*args, **kwargs)

        optimizer.step = checked_step

        def undo() -> None:
            optimizer.step = step
            del optimizer.overflow

        return undo

    def check_norm(self) -> None:
        """Read the norm here if there is no wrapper.

        DeepSpeed clips next, and a NaN norm would make every entry NaN.
        """
        if self.optimizer is not self.engine.basic_optimizer:
            return
        if not self._has_norm:  # no mask has acted on the gradient and taken it
            self.refresh_norm()
        self._has_norm = False
        self.optimizer.overflow = not math.isfinite(self.engine._global_grad_norm)
        if self.optimizer.overflow:
            self._note()

    def _report_norm(self, grads: list[Tensor]) -> None:
        if self.optimizer is self.engine.basic_optimizer:  # fp32: DeepSpeed keeps no norm of its own here
            self.engine._global_grad_norm = float(torch.nn.utils.get_total_norm(grads))
            self._has_norm = True

    def set_gradient(self, grad: Tensor) -> None:
        """Set the gradient of the values' parameter, and report its norm."""
        param = self.engine.module.get_parameter(PARAMETER_NAME)
        param.grad = grad.to(param.dtype)
        self._report_norm([param.grad])

    def local_backward(self) -> AbstractContextManager[None]:
        return self.engine.no_sync()

    def forget_backward(self) -> None:
        self.engine.zero_grad()
