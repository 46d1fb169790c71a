"""Add a term to the reduced gradient at every accumulation boundary, before overflow check, norm, clip and step.

It is what a penalty in the loss would add, but once per step and only on the elements whose gradient this rank holds.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import collective_device
from piece_ds.state.partition import Layout, ParameterInfo, partition_of
from piece_ds.zero.adapter import Piece, offload_device
from piece_ds.zero.sequence_parallel import refuse_sequences
from piece_ds.zero.supported import adapter_for

# Parameter name -> (flat index of the first element, values): one range of each parameter.
Ranges = dict[str, tuple[int, Tensor]]


class GradientTerm:
    """Read weights and gradients where they lie, and add to the gradients.

    Attributes:
        replicated: whether every rank holds all of them; if not, each holds its share.
    """

    def __init__(self, engine: Any) -> None:
        """Find where the engine keeps its gradients.

        Args:
            engine: deepspeed.DeepSpeedEngine without optimizer offload.
        Raises:
            UserError: the optimizer is offloaded: norms are then taken while gradients arrive, before a term is added.
                Or ranks share rows.
        """
        if offload_device(engine._config.zero_config.offload_optimizer) != "none":
            raise UserError(
                "this method changes the reduced gradient, which is not proven with optimizer offload: use "
                "a DeepSpeed configuration without zero_optimization.offload_optimizer"
            )
        refuse_sequences(engine, "a method that changes the reduced gradient")
        self._engine, self._adapter = engine, adapter_for(engine)
        self.replicated = self._adapter.replicated or engine.dp_world_size == 1

    def weights(self) -> Ranges:
        """Return fp32 values of the trained elements on this rank. A collective."""
        return _ranges(self._adapter.weights())

    def gradients(self) -> Ranges:
        """Return copies of the reduced gradient on this rank, fp32, without DeepSpeed's loss scale."""
        scale = self.loss_scale
        return {
            name: (start, grad.float() / scale) for name, (start, grad) in _ranges(self._adapter.gradients()).items()
        }

    @property
    def loss_scale(self) -> float:
        """The number by which DeepSpeed will divide the gradient."""
        return float(self._adapter.optimizer.loss_scale) if self._engine.fp16_enabled() else 1.0

    def add_(self, term: Ranges) -> None:
        """Add term to the reduced gradient.

        Args:
            term: name -> range that covers what it is added to, fp32, unscaled. Parameters not in it keep their
                gradient.
        """
        for grad, pieces in self._adapter.gradients():
            for piece in pieces:
                if piece.name in term:
                    start, values = term[piece.name]
                    part = values[piece.start - start : piece.start - start + piece.numel].to(
                        grad.device, torch.float32
                    )

                    # Gradients are scaled by the loss scale, so the term is as well. The sum is rounded once, from
                    # fp32.
                    place = grad[piece.offset : piece.offset + piece.numel]
                    place.copy_(place.float() + part * self.loss_scale)

        # Some stages have taken the norm already.
        self._adapter.refresh_norm()

    def install(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call function at every accumulation boundary; return remove."""
        return self._adapter.around_step(function)

    def ranges_of(self, layout: Layout, flat_N: Tensor) -> Ranges:
        """Return values of the canonical layout as ranges where this rank's gradients lie. A collective.

        Args:
            layout: of the model.
            flat_N: fp32, laid out by layout.owned().
        Cost: at stages 0 to 2 with several ranks, which shard otherwise, 4 bytes received for each eligible element.
        """
        found: Ranges = {}
        offset_of = {info.name: (part, offset) for info, part, offset in layout.owned()}
        places = {piece.name: piece for piece in self._adapter.places()}
        for info in layout.eligible():
            part, offset = offset_of[info.name]
            own, place = flat_N[offset : offset + part.numel], places.get(info.name)

            # ZeRO-3 shards as the layout does. Other stages need the whole parameter first.
            if type(self._adapter).__name__ == "Stage3" or layout.num_ranks == 1:
                start, whole = part.start, own
            else:
                start, whole = 0, gather_parameter(info, own, layout)
            if place is not None:
                found[info.name] = (place.start, _cut(whole, start, place))
        return found


def _cut(values: Tensor, start: int, place: Piece) -> Tensor:
    return values[place.start - start : place.start - start + place.numel].clone()


def _ranges(flats: list[tuple[Tensor, list[Piece]]]) -> Ranges:
    found: Ranges = {}
    for flat, pieces in flats:
        for piece in pieces:
            assert piece.name not in found, f"{piece.name} lies in two buffers"
            found[piece.name] = piece.start, flat.detach().view(-1)[piece.offset : piece.offset + piece.numel]
    return found


def gather_parameter(info: ParameterInfo, own: Tensor, layout: Layout) -> Tensor:
    """Return all elements of one parameter, fp32, gathered from every rank's chunk. A collective.

    Args:
        info: the parameter.
        own: this rank's chunk, 1-D.
        layout: of the model.
    """
    if info.rows is not None:
        raise UserError(f"only rows {info.rows} of {info.name!r} are eligible, which needs a method with a mask")

    # all_gather needs equal sizes, so the last rank's chunk is padded.
    chunk = partition_of(info.numel, 0, layout.num_ranks).numel
    padded = torch.zeros(chunk, dtype=torch.float32, device=collective_device())
    padded[: own.numel()] = own
    parts = [torch.empty_like(padded) for _ in range(layout.num_ranks)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[: info.numel].to(own.device)
