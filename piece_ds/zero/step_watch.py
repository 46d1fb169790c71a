"""A step whose gradient is NaN or infinite is not taken, whatever the wrapper; and what was wrong with it is known.

Most of DeepSpeed's wrappers skip such a step. Without one (stage 0 in fp32), and in bf16 at stages 1 and 2, the norm
clips every entry to NaN and all weights with it, also those outside the mask. The norm that is taken anyway decides;
single entries are looked at only once it has gone wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from piece_ds.zero.adapter import Adapter

Place = tuple[str, int]  # parameter name, flat index in it


@dataclass(frozen=True)
class SkippedStep:
    """Why a step was not taken, as far as this rank's share of the reduced gradient tells.

    Attributes:
        num_entries: NaN and infinite entries of the selected gradient here; 0 where the norm alone overflowed.
        first: the first of them in the model's order.
        may_recover: fp16's dynamic loss scale overflowed and falls: the next steps may be sound.
    """

    num_entries: int = 0
    first: Place | None = None
    may_recover: bool = False


class StepWatch:
    """Watches an engine's optimizer steps. Install it before anything else that acts around the step.

    Attributes:
        fault: of the last step; None where it was taken.
        replicated: every rank's fault is about the whole gradient, not about its share.
    """

    def __init__(self, adapter: Adapter, locate: Callable[[Place], Place] | None = None) -> None:
        """
        Args:
            adapter: of the engine.
            locate: place in what DeepSpeed optimises -> place in the model; None where they are the same.
        """
        self.fault: SkippedStep | None = None
        self.replicated = adapter.replicated
        self._adapter, self._locate = adapter, locate or (lambda place: place)

    def install(self) -> list[Callable[[], None]]:
        """From now on no step with a NaN or infinite norm is taken; returns functions that remove it."""
        return [self._adapter.skip_nonfinite(self._note), self._adapter.around_step(self._begin, self._end)]

    def take_charge(self) -> None:
        """The caller looks at every fault and decides what it comes to, also where fp16's loss scale cannot fall."""
        self._adapter.stay_at_smallest_scale()

    def _begin(self) -> None:
        self.fault = None
        self._adapter.check_norm()

    def _end(self) -> None:
        if self.fault is None and getattr(self._adapter.optimizer, "overflow", False):
            self.fault = SkippedStep(may_recover=self._adapter.scale_falls())

    def _note(self) -> None:
        """Called before DeepSpeed clears the gradient of a step that it does not take, perhaps more than once."""
        if self.fault is None:
            count, first = self._look()
            self.fault = SkippedStep(count, first, self._adapter.scale_falls())

    def _look(self) -> tuple[int, Place | None]:
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
