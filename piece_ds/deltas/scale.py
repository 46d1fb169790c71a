"""Part of a task: multiply a delta's changes by alpha, or keep only the largest of them.

A scaled file keeps the task's full values beside the scaled ones (NAME.unscaled). So any other alpha, 1 included, can
be reached from it to the bit.
"""

from collections.abc import Iterable, Mapping
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.delta_parts import CODINGS
from piece_ds.deltas.delta import Change, Delta
from piece_ds.deltas.write import require_previous, top, write_delta
from piece_ds.runtime.errors import UserError


def scaled_values(change: Change, alpha: float) -> Tensor:
    """Return previous + alpha * (full value - previous) in the parameter's dtype.

    At alpha 0 and 1 these are the exact bits of either side. Otherwise the arithmetic is fp64, rounded once. The full
    value is the task's own, whatever the change was scaled by before.

    Raises:
        ValueError: alpha is not 1 and the change has no previous values.
    """
    full = change.values if change.unscaled is None else change.unscaled
    if alpha == 1.0:
        return full.clone()
    if change.previous is None:
        raise ValueError(f"a change without previous values cannot be scaled by {alpha}")
    if alpha == 0.0:
        return change.previous.clone()
    before = change.previous.double()
    scaled = (before + alpha * (full.double() - before)).to(full.dtype)
    return torch.where(
        bits_equal(full, change.previous), full, scaled
    )  # keeps NaN, infinity and -0.0 that did not change


def bits_equal(first: Tensor, second: Tensor) -> Tensor:
    """Return, per element, whether two tensors of one dtype have the same bits."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return first.view(kinds[first.element_size()]) == second.view(kinds[first.element_size()])


def scale_delta(delta: Delta, alpha: float, output: Path | str, *, coding: str = CODINGS[0]) -> None:
    """Write the delta with its changes multiplied by alpha.

    Args:
        delta: with previous values.
        alpha: 0 gives the base, 1 the task. Any other alpha can be reached exactly from the result.
        output: path of the new delta.
        coding: see write_parts().
    Raises:
        UserError: alpha is not finite, the delta has no previous values, or a value would overflow.
    Memory: the result.
    """
    if not isfinite(alpha):
        raise UserError(f"alpha is {alpha}: expected a finite number, such as 0.5")
    require_previous(delta, "scaling")
    changes = {}
    for name in delta.shapes:
        change = delta.change(name)
        full = change.values if change.unscaled is None else change.unscaled
        changes[name] = Change(change.index, scaled_values(change, alpha), change.previous, full)
    write_delta(output, changes, delta.shapes, delta.metadata, scale=alpha, coding=coding)


PRUNE_BY = ("change", "relative")


def prune_delta(
    delta: Delta, keep: float, output: Path | str, by: str = PRUNE_BY[0], *, coding: str = CODINGS[0]
) -> None:
    """Write the delta with only its largest changes: max(1, int(keep * selected)) of them. Ties go to the first.

    Args:
        delta: with previous values.
        keep: share of the selected elements, in (0, 1].
        output: path of the new delta.
        by: 'change' is |value - previous|; 'relative' divides it by |previous| (infinite if previous is 0).
        coding: see write_parts().
    Raises:
        UserError: keep or by is none of these, or the delta has no previous values.
    """
    if by not in PRUNE_BY:
        raise UserError(f"by is {by!r}: expected one of {', '.join(PRUNE_BY)}")
    require_share(keep)
    require_previous(delta, "pruning")
    scores = {name: _size(change, by) for name, change in delta.changes()}
    keep_largest(delta, keep, scores, output, coding=coding)


def keep_largest(
    delta: Delta, keep: float, scores: Mapping[str, Tensor], output: Path | str, *, coding: str = CODINGS[0]
) -> None:
    """Write the delta with only the changes of the highest scores: max(1, int(keep * selected)) of them.

    Args:
        delta: with previous values.
        keep: share of the selected elements, in (0, 1].
        scores: for each parameter, one number a change. Ties go to the first.
        output: path of the new delta.
        coding: see write_parts().
    Raises:
        UserError: keep is outside its range.
    """
    require_share(keep)
    changes = dict(delta.changes())
    # One budget over all parameters.
    every = torch.cat([scores[name] for name in changes])
    chosen = top(every, max(1, int(keep * every.numel())))
    kept = dict(zip(changes, split(chosen, (change.index.numel() for change in changes.values())), strict=True))
    pruned = {name: take(change, kept[name]) for name, change in changes.items()}
    write_delta(output, pruned, delta.shapes, delta.metadata, scale=delta.scale, coding=coding)


def require_share(keep: float) -> None:
    """Raise UserError unless keep is in (0, 1]."""
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep}: expected a share of the selected elements, in (0, 1]")


def split(chosen: Tensor, sizes: Iterable[int]) -> list[Tensor]:
    """Return ascending places in a concatenation as places in each of its parts."""
    parts, begin = [], 0
    for size in sizes:
        low, high = torch.searchsorted(chosen, torch.tensor([begin, begin + size])).tolist()
        parts.append(chosen[low:high] - begin)
        begin += size
    return parts


def take(change: Change, places: Tensor) -> Change:
    """Return the elements of a change at places."""
    previous = None if change.previous is None else change.previous[places]
    unscaled = None if change.unscaled is None else change.unscaled[places]
    return Change(change.index[places], change.values[places], previous, unscaled)


def _size(change: Change, by: str) -> Tensor:
    assert change.previous is not None
    before = change.previous.double()
    distance = (change.values.double() - before).abs()
    return distance if by == "change" else distance / before.abs()
