"""Multiply the base optimizer's update of each element by a factor. Moments, norm and clip are not affected.

The update of a master is its value after the step minus its value before it, without weight decay on either side. That
difference is multiplied by the factor. This is exact for every optimizer that treats elements separately. It acts on
the masters that DeepSpeed's wrapper steps, wherever they lie, and however often a boundary steps a part of them. If
DeepSpeed skips a step for an overflow or a NaN, the base optimizer does not step, and nothing is scaled.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from piece_ds.state.partition import Layout
from piece_ds.zero.adapter import Adapter, Piece, positions_in
from piece_ds.zero.gradient_term import gather_parameter


@dataclass
class _Scaled:
    """The scaled elements of one master.

    Attributes:
        positions: ascending, in the flat master; None means all of them.
        factor: fp32, one for each.
        before: their values before the current step.
    """

    positions: Tensor | None
    factor: Tensor
    before: Tensor | None = None

    def to_(self, device: torch.device) -> None:
        """Move positions and factors to device, where the master lies."""
        if self.factor.device != device:
            self.factor = self.factor.to(device)
            self.positions = None if self.positions is None else self.positions.to(device)

    def read(self, master: Tensor) -> Tensor:
        """Return a copy of the elements."""
        flat = master.data.view(-1)
        return flat.clone() if self.positions is None else flat[self.positions]

    def write_(self, master: Tensor, values: Tensor) -> None:
        """Set the elements."""
        flat = master.data.view(-1)
        if self.positions is None:
            flat.copy_(values)
        else:
            flat[self.positions] = values.to(flat.dtype)


def scaled(before: Tensor, after: Tensor, factor: Tensor) -> Tensor:
    """Return before + factor * (after - before), fp32, rounded after each of the three operations.

    Every mode uses these operations on any part, so compact and masked mode give the same bits.
    """
    start = before.float()
    return (after.float() - start).mul_(factor).add_(start)


class ScaledUpdate:
    """Factors on what an engine's base optimizer adds to its masters.

    Install it after what decays the masters.
    """

    def __init__(self, adapter: Adapter, elements: dict[int, _Scaled]) -> None:
        """Keep the masters and their factors; install() makes them act.

        Args:
            adapter: of the engine.
            elements: id of a master -> its scaled elements.
        """
        self._masters = adapter.masters()  # keeps the ids in use
        self._elements = elements

    def install(self, optimizer: torch.optim.Optimizer) -> list[Callable[[], None]]:
        """Act in every step of the base optimizer; return functions that remove the hooks."""
        return [
            optimizer.register_step_pre_hook(self._before_step).remove,
            optimizer.register_step_post_hook(self._after_step).remove,
        ]

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:  # DeepSpeed may step one group or sub-group at a time
            for master in group["params"]:
                found = self._elements.get(id(master))
                if found is not None:
                    found.to_(master.device)
                    found.before = found.read(master)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for master in group["params"]:
                found = self._elements.get(id(master))
                if found is not None and found.before is not None:
                    found.write_(master, scaled(found.before, found.read(master), found.factor))
                    found.before = None


def scale_selected(adapter: Adapter, index: dict[str, Tensor], factor: dict[str, Tensor]) -> ScaledUpdate:
    """Return the scaling of selected elements.

    Args:
        adapter: of the engine.
        index: name of a parameter that DeepSpeed optimises -> ascending flat positions over all ranks.
        factor: the same names -> a factor for each position, fp32, on the CPU.
    Cost: 12 bytes for each selected element that this rank updates, and 8 during a step.
    """
    found = {}
    for master, pieces in adapter.masters():
        parts = [torch.zeros(0)]
        for piece in pieces:
            # Take the factors of the positions that lie in this rank's master.
            if piece.name in index:
                borders = torch.tensor([piece.start, piece.start + piece.numel])
                low, high = torch.searchsorted(index[piece.name], borders).tolist()
                parts.append(factor[piece.name][low:high])
        found[id(master)] = _Scaled(positions_in(pieces, index), torch.cat(parts))
    return ScaledUpdate(adapter, found)


def scale_all(adapter: Adapter, layout: Layout, factor_N: Tensor) -> ScaledUpdate:
    """Return the scaling of everything that the engine trains. A collective.

    Args:
        adapter: of the engine.
        layout: of the model.
        factor_N: fp32, laid out by layout.owned(); elements that are not there keep the factor 1.
    Cost: 4 bytes for each master element, lying with the masters, and 4 more while a master is stepped. At stages 0 to
    2 with several ranks, 4 bytes are received once for each eligible element.
    """
    # Begin with factor 1 everywhere.
    masters = adapter.masters()
    found = {
        id(master): _Scaled(None, torch.ones(master.numel(), dtype=torch.float32, device=master.device))
        for master, _ in masters
    }

    # Find where each parameter lies in the masters.
    places: dict[str, list[tuple[Tensor, Piece]]] = {}
    for master, pieces in masters:
        for piece in pieces:
            places.setdefault(piece.name, []).append((found[id(master)].factor, piece))

    # Fill in the factors. ZeRO-3 shards as the layout does; other stages need the whole parameter.
    as_owned = type(adapter).__name__ == "Stage3" or layout.num_ranks == 1
    for info, part, offset in layout.owned():
        own = factor_N[offset : offset + part.numel]
        start, values = (part.start, own) if as_owned else (0, gather_parameter(info, own, layout))
        for factor, piece in places.get(info.name, []):
            target = factor[piece.offset : piece.offset + piece.numel]
            target.copy_(values[piece.start - start : piece.start - start + piece.numel])
    return ScaledUpdate(adapter, found)
