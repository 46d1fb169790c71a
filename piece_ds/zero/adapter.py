"""What every ZeRO stage must offer, whichever wrapper DeepSpeed uses for it.

An adapter knows where one engine keeps reduced gradients and fp32 masters, and how to leave the engine as if a
backward had not happened. It is made by adapter_for() and holds no tensor of its own but selected positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ds import ops


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of parameter `name`, lying at [offset, offset + numel) of a flat buffer."""

    name: str
    start: int
    numel: int
    offset: int


def positions_in(pieces: Iterable[Piece], index: dict[str, Tensor]) -> Tensor:
    """Ascending positions (int64, CPU) in the flat buffer of the selected elements that lie in pieces.

    Args:
        pieces: in ascending order of offset.
        index: parameter name -> ascending flat positions of its selected elements.
    """
    found = [torch.zeros(0, dtype=torch.int64)]
    for piece in pieces:
        if piece.name in index:
            whole = index[piece.name]
            low, high = torch.searchsorted(whole, torch.tensor([piece.start, piece.start + piece.numel])).tolist()
            found.append(whole[low:high] - piece.start + piece.offset)
    return torch.cat(found)


def cut(pieces: Iterable[Piece], begin: int, end: int) -> list[Piece]:
    """The parts of pieces inside [begin, end) of the flat buffer, with offsets counted from begin."""
    result = []
    for piece in pieces:
        low, high = max(piece.offset, begin), min(piece.offset + piece.numel, end)
        if low < high:
            result.append(Piece(piece.name, piece.start + low - piece.offset, high - low, low - begin))
    return result


class Adapter(ABC):
    """One engine's gradients, masters and micro-step state.

    Attributes:
        engine: the deepspeed.DeepSpeedEngine.
        optimizer: engine.optimizer (DeepSpeed's wrapper, or the bare torch optimizer).
        name_of: id(parameter) -> its name in engine.module.named_parameters().
    """

    private_names: tuple[str, ...] = ()
    replicated = False  # whether every rank holds the whole reduced gradient

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.optimizer = engine.optimizer
        self.name_of = {id(param): name for name, param in engine.module.named_parameters()}
        for name in self.private_names:
            if not hasattr(self.optimizer, name):
                raise RuntimeError(
                    f"deepspeed's {type(self.optimizer).__name__} has no attribute {name!r}: this version keeps its "
                    "gradients elsewhere; install a deepspeed between 0.19.2 and 0.19.8, which are known to work"
                )

    @abstractmethod
    def masters(self) -> list[tuple[Tensor, list[Piece]]]:
        """The flat tensors that the base optimizer updates on this rank, with the parameters' places in them."""

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
        """DeepSpeed reduces nothing after backward, since set_gradient() hands it what is reduced; returns undo.

        Else stage 0 would all-reduce zeros for every parameter that requires a gradient, and stages 1 and 2 look for
        buckets that were never made.
        """
        before = self.engine.enable_backward_allreduce
        self.engine.enable_backward_allreduce = False
        return lambda: setattr(self.engine, "enable_backward_allreduce", before)

    def install_mask(self) -> Callable[[], None]:
        """mask_gradients_() at every accumulation boundary, before DeepSpeed looks at the gradients; returns remove."""
        return self.around_step(self.mask_gradients_)

    def around_step(self, before: Callable[[], None], after: Callable[[], None] | None = None) -> Callable[[], None]:
        """Call functions at every accumulation boundary, around all that DeepSpeed does there; returns remove.

        What came later lies around what came before. Any of them may be removed first.
        """
        engine, hook = self.engine, (before, after)
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

            engine._take_model_step = _take_model_step
        hooks.append(hook)

        def remove() -> None:
            if hook in hooks:
                hooks.remove(hook)
                if not hooks:
                    engine.__dict__.pop("_take_model_step", None)

        return remove

    @abstractmethod
    def gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        """At an accumulation boundary: the flat tensors that hold the reduced gradient here, which may be written.

        Not with optimizer offload, where norms were taken while gradients arrived.
        """

    def weights(self) -> list[tuple[Tensor, list[Piece]]]:
        """fp32 values of the elements whose reduced gradient is here; not to be written. A collective."""
        return self.masters()

    def places(self) -> list[Piece]:
        """The elements whose reduced gradient is here; offsets mean nothing."""
        return [piece for _, pieces in self.masters() for piece in pieces]

    def refresh_norm(self) -> None:  # noqa: B027 - DeepSpeed takes the norm itself, later, at most stages
        """Report the norm of the gradient as it is now."""

    def skip_nonfinite(self, note: Callable[[], None]) -> Callable[[], None]:
        """From now on a step whose gradient's norm is NaN or infinite is not taken; returns undo.

        Args:
            note: called when that happens, while the gradient is still there.
        """
        optimizer = self.optimizer
        original = optimizer._update_scale

        def _update_scale(overflow: bool = False) -> None:
            if overflow:
                note()
            original(overflow)

        optimizer._update_scale = _update_scale
        return lambda: optimizer.__dict__.pop("_update_scale", None)

    def check_norm(self) -> None:  # noqa: B027 - DeepSpeed looks at the norm itself at most stages
        """Called before every step, when the gradient is as it will be applied."""

    def stay_at_smallest_scale(self) -> None:
        """fp16: DeepSpeed does not raise where its loss scale cannot fall any more; scale_falls() is False then."""
        scaler: Any = getattr(self.optimizer, "loss_scaler", None)
        if hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False

    def scale_falls(self) -> bool:
        """Whether a step that is not taken lowers fp16's loss scale, so that later ones may be sound."""
        scaler: Any = getattr(self.optimizer, "loss_scaler", None)
        return bool(getattr(scaler, "dynamic", False)) and scaler.cur_scale > scaler.min_scale

    def step_gradients(self) -> list[tuple[Tensor, list[Piece]]]:
        """gradients() also with optimizer offload, where the masters have them; to be read only."""
        if offload_device(self.engine._config.zero_config.offload_optimizer) == "none":
            return self.gradients()
        return [(master.grad, pieces) for master, pieces in self.masters() if master.grad is not None]

    @abstractmethod
    def local_backward(self) -> AbstractContextManager[None]:
        """Inside, engine.backward leaves this rank's gradients on the parameters and reduces nothing."""

    @abstractmethod
    def forget_backward(self) -> None:
        """Bring the engine back to the state before the backwards of local_backward()."""

    def abandon_backward(self) -> None:
        """forget_backward() after an error has ended a forward or a backward in its middle, on every rank."""
        self.forget_backward()


def offload_device(offload: Any) -> str:
    """Return where a part of zero_optimization's offloading puts things: "none", "cpu" or "nvme"."""
    return "none" if offload is None else str(getattr(offload.device, "value", offload.device))


class BoundGradients:
    """Selected positions for gradients that are lists of tensors whose concatenation is a flat buffer."""

    def __init__(self) -> None:
        self._positions: dict[Any, Tensor] = {}
        self._on_device: dict[tuple[Any, int, int, torch.device], Tensor] = {}

    def bind(self, key: Any, pieces: list[Piece], index: dict[str, Tensor]) -> None:
        """Set the selection of buffer `key`."""
        self._positions[key] = positions_in(pieces, index)
        self._on_device = {}

    def mask_(self, key: Any, grad: Tensor, offset: int = 0) -> None:
        """Zero grad, which is [offset, offset + grad.numel()) of buffer `key`, outside the selection."""
        ops.apply_mask_(grad.view(-1), self._local(key, offset, grad.numel(), grad.device))

    def mask_all_(self, key: Any, grads: list[Tensor]) -> None:
        """mask_() of the tensors whose concatenation is the front of buffer `key`, in one call where dtypes agree."""
        if len({(grad.dtype, grad.device) for grad in grads}) == 1:
            numel = sum(grad.numel() for grad in grads)
            ops.apply_mask_list_([grad.view(-1) for grad in grads], self._local(key, 0, numel, grads[0].device))
            return
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
