"""Define what piece_ds needs of every ZeRO stage, whichever wrapper DeepSpeed uses for it.

An adapter knows where one engine keeps reduced gradients and fp32 masters. It also knows how to leave the engine as if
a backward had not happened. adapter_for() makes it. It holds no tensor of its own, only selected positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.runtime.overriding import override


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of parameter `name`, stored at [offset, offset + numel) of a flat buffer."""

    name: str
    start: int
    numel: int
    offset: int


def positions_in(pieces: Iterable[Piece], index: dict[str, Tensor]) -> Tensor:
    """Return the ascending positions (int64, CPU) in the flat buffer of the selected elements that lie in pieces.

    Args:
        pieces: in ascending order of offset.
        index: parameter name -> ascending flat positions of its selected elements (CPU).
    """
    found = [torch.zeros(0, dtype=torch.int64)]
    for piece in pieces:
        if piece.name in index:
            # The index is sorted, so two binary searches find the range that the piece holds.
            whole = index[piece.name]
            low, high = torch.searchsorted(whole, torch.tensor([piece.start, piece.start + piece.numel])).tolist()
            found.append(whole[low:high] - piece.start + piece.offset)
    return torch.cat(found)


def pieces_between(pieces: Iterable[Piece], begin: int, end: int) -> list[Piece]:
    """Return the parts of pieces inside [begin, end) of the flat buffer, with offsets counted from begin."""
    result = []
    for piece in pieces:
        low, high = max(piece.offset, begin), min(piece.offset + piece.numel, end)
        if low < high:
            result.append(Piece(piece.name, piece.start + low - piece.offset, high - low, low - begin))
    return result


class Adapter(ABC):
    """Give access to one engine's gradients, masters and micro-step state.

    Attributes:
        engine: the deepspeed.DeepSpeedEngine.
        optimizer: engine.optimizer (DeepSpeed's wrapper, or the bare torch optimizer).
        name_of: id(parameter) -> its name in engine.module.named_parameters().
        private_names: attributes of DeepSpeed's wrapper that the adapter reads. A missing one raises RuntimeError.
        replicated: whether every rank holds the whole reduced gradient.
    """

    private_names: tuple[str, ...] = ()
    replicated = False  # whether every rank holds the whole reduced gradient

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.name_of = {id(param): name for name, param in engine.module.named_parameters()}

        # Fail here, before training, if this DeepSpeed has renamed what the adapter reads.
        for name in self.private_names:
            if not hasattr(self.optimizer, name):
                raise RuntimeError(
                    f"deepspeed's {type(self.optimizer).__name__} has no attribute {name!r}: this version keeps its "
                    "gradients elsewhere; install a deepspeed between 0.19.2 and 0.19.8, which are known to work"
                )

    @abstractmethod
    def masters(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return the flat tensors that the base optimizer updates on this rank, with the parameters' places in them."""

    @abstractmethod
    def bind(self, index: dict[str, Tensor]) -> None:
        """Remember where the selected elements (positions over all ranks) lie in this rank's gradients."""

    @abstractmethod
    def mask_gradients_(self) -> None:
        """Zero the reduced gradient outside the bound selection, before overflow check, norm, clip and step."""

    def prepare(self) -> None:  # noqa: B027 - most stages have nothing to undo
        """Undo what DeepSpeed's constructor did to masters and moments, if anything."""

    @abstractmethod
    def set_gradient(self, grad: Tensor) -> None:
        """Hand DeepSpeed the reduced gradient of its only parameter, as its own reduction would have left it.

        Called at an accumulation boundary, before overflow check, unscaling, norm, clip and step.

        Args:
            grad: of the whole parameter, the same on every rank, fp32, 1-D; scaled by DeepSpeed's loss scale.
        """

    def bypass_reduction(self) -> Callable[[], None]:
        """Stop DeepSpeed from reducing gradients after backward; return undo.

        set_gradient() hands DeepSpeed what is already reduced. If DeepSpeed reduced as well, stage 0 would all-reduce
        zeros for every parameter that requires a gradient. Stages 1 and 2 would look for buckets that were never made.
        """
        before = self.engine.enable_backward_allreduce
        self.engine.enable_backward_allreduce = False
        return lambda: setattr(self.engine, "enable_backward_allreduce", before)

    def install_mask(self) -> Callable[[], None]:
        """Mask the gradients at every accumulation boundary, before DeepSpeed reads them; return remove."""
        return self.around_step(self.mask_gradients_)

    def around_step(self, before: Callable[[], None], after: Callable[[], None] | None = None) -> Callable[[], None]:
        """Call functions at every accumulation boundary, around all that DeepSpeed does there; return remove.

        Hooks nest: one that is installed later encloses those installed before it. They may be removed in any order.
        """
        engine, hook = self.engine, (before, after)

        # One list an engine. DeepSpeed's method is wrapped once, however many hooks there are.
        hooks = engine.__dict__.setdefault("_piece_ds_step_hooks", [])
        if not hooks:
            original = engine._take_model_step

            def _take_model_step(*args: Any, **kwargs: Any) -> Any:
                now = tuple(hooks)  # one of them may remove itself
                for enter, _ in reversed(now):
                    enter()
                result = original(*args, **kwargs)
                for _, leave in now:
                    if leave is not None:
                        leave()
                return result

            engine._piece_ds_step_undo = override(engine, "_take_model_step", _take_model_step)

        # The last hook to go also takes the wrapper away.
        hooks.append(hook)

        def remove() -> None:
            if hook in hooks:
                hooks.remove(hook)
                if not hooks:
                    engine._piece_ds_step_undo()

        return remove

    @abstractmethod
    def gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return the flat tensors of this rank's reduced gradient, with the parameters' places. They may be written.

        Valid at an accumulation boundary. Not for optimizer offload, because there norms are taken while gradients
        arrive.
        """

    def weights(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return fp32 values of the elements whose reduced gradient is on this rank. A collective.

        They are not to be written.
        """
        return self.masters()

    def places(self) -> list[Piece]:
        """Return the elements whose reduced gradient is on this rank. Their offsets mean nothing."""
        return [piece for _, pieces in self.masters() for piece in pieces]

    def refresh_norm(self) -> None:  # noqa: B027 - DeepSpeed takes the norm itself, later, at most stages
        """Report the norm of the gradient as it is now. Most stages need nothing: DeepSpeed takes the norm later."""

    def skip_nonfinite(self, note: Callable[[], None]) -> Callable[[], None]:
        """Skip every later step whose gradient norm is NaN or infinite; return undo.

        Args:
            note: called when that happens, while the gradient still exists.
        """
        optimizer = self.optimizer

        # DeepSpeed's wrapper already skips the step. This hook only tells that it did.
        original = optimizer._update_scale

        def _update_scale(overflow: bool = False) -> None:
            if overflow:
                note()
            original(overflow)

        return override(optimizer, "_update_scale", _update_scale)

    def check_norm(self) -> None:  # noqa: B027 - DeepSpeed looks at the norm itself at most stages
        """Check the gradient norm before a step, if DeepSpeed does not. The gradient is as it will be applied."""

    def stay_at_smallest_scale(self) -> None:
        """Keep DeepSpeed from raising if its fp16 loss scale cannot fall any further. scale_falls() is False then."""
        scaler: Any = getattr(self.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False

    def scale_falls(self) -> bool:
        """Return whether a skipped step lowers fp16's loss scale, so that later steps may be finite."""
        scaler: Any = getattr(self.optimizer, "loss_scaler", None)
        return bool(getattr(scaler, "dynamic", False)) and scaler.cur_scale > scaler.min_scale

    def step_gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        """Return gradients(), also for optimizer offload, for which the masters hold them. Only to be read."""
        if offload_device(self.engine._config.zero_config.offload_optimizer) == "none":
            return self.gradients()
        return [(master.grad, pieces) for master, pieces in self.masters() if master.grad is not None]

    @abstractmethod
    def local_backward(self) -> AbstractContextManager[None]:
        """Return a context in which engine.backward leaves gradients on the parameters and reduces nothing."""

    @abstractmethod
    def forget_backward(self) -> None:
        """Restore the state that the engine had before the backwards of local_backward()."""

    def abandon_backward(self) -> None:
        """Restore the state as forget_backward() does, after an error inside a forward or backward, on every rank."""
        self.forget_backward()


def offload_device(offload: Any) -> str:
    """Return where DeepSpeed offloads a part of the state: "none", "cpu" or "nvme".

    Args:
        offload: zero_optimization.offload_optimizer or .offload_param; None means no offload.
    """
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))


class BoundGradients:
    """Selected positions for gradients that are lists of tensors, whose concatenation is a flat buffer."""

    def __init__(self) -> None:
        self._positions: dict[Any, Tensor] = {}
        self._on_device: dict[tuple[Any, int, int, torch.device], Tensor] = {}

    def bind(self, key: Any, pieces: list[Piece], index: dict[str, Tensor]) -> None:
        """Set the selection of buffer `key`."""
        self._positions[key] = positions_in(pieces, index)
        self._on_device = {}

    def mask_(self, key: Any, grad: Tensor, offset: int = 0) -> None:
        """Zero grad outside the selection. It is the range [offset, offset + grad.numel()) of buffer `key`."""
        ops.apply_mask_(grad.view(-1), self._local(key, offset, grad.numel(), grad.device))

    def mask_all_(self, key: Any, grads: list[Tensor]) -> None:
        """Mask tensors whose concatenation is the front of buffer `key`, in one call if they share dtype and device."""
        if len({(grad.dtype, grad.device) for grad in grads}) == 1:
            numel = sum(grad.numel() for grad in grads)
            ops.apply_mask_list_([grad.view(-1) for grad in grads], self._local(key, 0, numel, grads[0].device))
            return

        # Otherwise one call a tensor.
        offset = 0
        for grad in grads:  # stage 3 has zeros in the weight's dtype for a parameter without a gradient
            self.mask_(key, grad, offset)
            offset += grad.numel()

    def _local(self, key: Any, offset: int, numel: int, device: torch.device) -> Tensor:
        where = (key, offset, numel, device)
        if where not in self._on_device:  # copied to the device once, not at every step
            positions = self._positions[key]
            low, high = torch.searchsorted(positions, torch.tensor([offset, offset + numel])).tolist()
            self._on_device[where] = (positions[low:high] - offset).to(device)
        return self._on_device[where]
