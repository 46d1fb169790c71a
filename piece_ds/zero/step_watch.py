"""Skip every step whose gradient is NaN or infinite, whatever the wrapper, and find out what was wrong with it.

Most of DeepSpeed's wrappers skip such a step. Stage 0 in fp32 and stages 1 and 2 in bf16 do not. There, clipping by the
norm makes every entry NaN, and all weights with it, also those outside the mask. The norm that is taken anyway decides.
Single entries are looked at only if it is not finite.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from piece_ds.zero.adapter import Adapter

Place = tuple[str, int]  # parameter name, flat index in it


@dataclass(frozen=True)
class SkippedStep:
    """Why a step was skipped, as far as this rank's share of the reduced gradient tells.

    Attributes:
        num_entries: NaN and infinite entries of the selected gradient on this rank; 0 if only the norm overflowed.
        first: the first of them in the model's order.
        may_recover: fp16's dynamic loss scale overflowed and falls, so the next steps may be finite.
    """

    num_entries: int = 0
    first: Place | None = None
    may_recover: bool = False


class StepWatch:
    """Watch an engine's optimizer steps. Install it before anything else that acts around the step.

    Hooks that are installed later run earlier, so the watch sees the gradient as it will be applied.

    Attributes:
        fault: of the last step; None if it was taken.
        replicated: whether every rank's fault is about the whole gradient; if not, it is about the rank's share.
    """

    def __init__(self, adapter: Adapter, locate: Callable[[Place], Place] | None = None) -> None:
        """Prepare to watch; install() begins.

        Args:
            adapter: of the engine.
            locate: place in what DeepSpeed optimises -> place in the model; None if they are the same.
        """
        self.fault: SkippedStep | None = None
        self.replicated = adapter.replicated
        self._adapter, self._locate = adapter, locate or (lambda place: place)

    def install(self) -> list[Callable[[], None]]:
        """Skip every later step with a NaN or infinite norm; return functions that remove the hooks."""
        return [self._adapter.skip_nonfinite(self._note), self._adapter.around_step(self._begin, self._end)]

    def take_charge(self) -> None:
        """Leave it to the caller what a fault leads to, even if fp16's loss scale cannot fall any further."""
        self._adapter.stay_at_smallest_scale()

    def _begin(self) -> None:
        self.fault = None
        self._adapter.check_norm()

    def _end(self) -> None:
        # DeepSpeed found an overflow by itself, and the gradient is gone.
        if self.fault is None and getattr(self._adapter.optimizer, "overflow", False):
            self.fault = SkippedStep(may_recover=self._adapter.scale_falls())

    def _note(self) -> None:
        """Record the fault. Called before DeepSpeed clears the gradient of a skipped step, perhaps more than once."""
        if self.fault is None:
            count, first = self._look()
            self.fault = SkippedStep(count, first, self._adapter.scale_falls())

    def _look(self) -> tuple[int, Place | None]:
        # Count the entries in this rank's share, and find the first in the model's order.
        order = {name: number for number, name in enumerate(self._adapter.name_of.values())}
        count, found = 0, []
        for grad, pieces in self._adapter.step_gradients():
            flat = grad.detach().view(-1)
            for piece in pieces:
                wrong = (~torch.isfinite(flat[piece.offset : piece.offset + piece.numel])).nonzero().view(-1)
                if wrong.numel():
                    count += wrong.numel()
                    found.append((order[piece.name], piece.start + int(wrong[0]), piece.name))
        if not found:
            return 0, None
        _, index, name = min(found)
        return count, self._locate((name, index))
