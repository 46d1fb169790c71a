"""Merge several tasks into one delta: by a linear combination, also by depth (LiNeS), by TIES, or by DARE.

A task's change is value - previous at its selected elements and 0 elsewhere. The result is base + scale * merged.

- Linear: the sum of w_i t_i.
- LiNeS: the same, multiplied by a factor that rises with depth; see depth.py.
- TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1): keep each task's largest changes, elect the sign of the
  larger total per element, average the changes that have this sign.
- DARE (Yu et al. 2023, arXiv 2311.03099): drop each change with probability 1 - density, multiply the others by 1 /
  density, then sum w_i t_i.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.delta_parts import CODINGS
from piece_ds.deltas.delta import Change, Delta
from piece_ds.deltas.depth import depth_factors
from piece_ds.deltas.scale import split
from piece_ds.deltas.write import require_previous, top, write_delta
from piece_ds.runtime.errors import UserError

HOWS = ("linear", "lines", "ties", "dare")
LINES_DEPTH = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Merge:
    """How deltas are merged.

    Attributes:
        how: one of HOWS.
        weights: one per delta; None means 1 / number of deltas. TIES weights the changes before it elects signs, and
            divides by the weights of those that agree.
        density: share of each task's changes to keep, in (0, 1]: the largest (ties), or drawn at random (dare).
        scale: factor of the merged change.
        seed: of DARE's draws.
        depth: with lines, the factors of the first and of the last block.
    Raises:
        UserError: a value is out of its range, or does not fit `how`.
    """

    how: str
    weights: tuple[float, ...] | None = None
    density: float = 1.0
    scale: float = 1.0
    seed: int = 42
    depth: tuple[float, float] = LINES_DEPTH

    def __post_init__(self) -> None:
        if self.how not in HOWS:
            raise UserError(f"how is {self.how!r}: expected one of {', '.join(HOWS)}")
        if not 0 < self.density <= 1:
            raise UserError(f"density is {self.density}: expected a share of the changes, in (0, 1]")
        numbers = torch.tensor([self.scale, *(self.weights or ())], dtype=torch.float64)
        if not bool(numbers.isfinite().all()):
            raise UserError("scale and weights must be finite numbers")
        if self.how in ("linear", "lines") and self.density != 1:
            raise UserError(f"density has no meaning with how {self.how!r}, which keeps every change")
        if not bool(torch.tensor(self.depth, dtype=torch.float64).isfinite().all()):
            raise UserError("depth must be two finite numbers, such as 0.2,1")
        if self.how != "lines" and self.depth != LINES_DEPTH:
            raise UserError(f"depth has no meaning with how {self.how!r}: only lines scales by depth")
        if self.how == "ties" and min(self.weights or (1.0,)) <= 0:
            raise UserError("weights of TIES must be above 0: it divides by the weights of the tasks that agree")


def merge_deltas(
    deltas: Sequence[Delta],
    merge: Merge,
    output: Path | str,
    names: Iterable[str] = (),
    *,
    coding: str = CODINGS[0],
) -> None:
    """Write the delta that merges tasks, for the base of the first one.

    Args:
        deltas: all of one base, or each on top of the one before; with previous values.
        merge: how.
        output: path of the new delta.
        names: of all parameters of the model; lines counts the blocks by them.
        coding: see write_parts().
    Raises:
        UserError: the deltas have no base in common or no previous values, or there are not as many weights as deltas.
    Memory: the changes of all deltas, in fp64.
    """
    _check(deltas)
    weights = merge.weights or (1.0 / len(deltas),) * len(deltas)
    if len(weights) != len(deltas):
        raise UserError(f"{len(weights)} weights for {len(deltas)} deltas: give one for each")

    # Reduce each task's changes, then merge them parameter by parameter.
    kept = [_sparsified(delta, number, merge) for number, delta in enumerate(deltas)]
    shapes = {name: shape for delta in deltas for name, shape in delta.shapes.items()}
    factors = depth_factors({*names, *shapes}, *merge.depth) if merge.how == "lines" else {}
    changes: dict[str, Change] = {}
    for name in shapes:
        parts = [
            (delta.change(name), weight, tau[name])
            for delta, weight, tau in zip(deltas, weights, kept, strict=True)
            if name in tau
        ]
        changes[name] = _merged(parts, merge, merge.scale * factors.get(name, 1.0))
    metadata = deltas[0].metadata | {
        "method": f"{merge.how}({'+'.join(d.metadata.get('method', '?') for d in deltas)})"
    }
    write_delta(output, changes, shapes, metadata, coding=coding)


def _check(deltas: Sequence[Delta]) -> None:
    first = deltas[0]
    for delta in deltas:
        require_previous(delta, "merging")
        if delta.metadata.get("model_fingerprint") != first.metadata.get("model_fingerprint"):
            raise UserError(f"deltas {first.path} and {delta.path} are of different models")
        if any(first.dtypes[name] != dtype for name, dtype in delta.dtypes.items() if name in first.dtypes):
            raise UserError(f"deltas {first.path} and {delta.path} hold values of different dtypes")
    bases = [delta.base_fingerprint for delta in deltas]
    if None in bases:
        raise UserError(
            f"delta {deltas[bases.index(None)].path} has no fingerprint: nothing can show what it is based on"
        )
    # Either all start from one base, or each from the result of the one before.
    stacked = all(before.result_fingerprint == after.base_fingerprint for before, after in pairwise(deltas))
    if len(set(bases)) > 1 and not stacked:
        raise UserError(
            f"deltas {', '.join(str(delta.path) for delta in deltas)} are neither of one base nor each on top of the "
            "one before: their changes cannot be merged"
        )


def _sparsified(delta: Delta, number: int, merge: Merge) -> dict[str, Tensor]:
    """Return a task's changes by parameter, fp64, one per selected element. Dropped changes are 0."""
    found = {}
    for name in delta.shapes:
        change = delta.change(name)
        assert change.previous is not None
        found[name] = change.values.double() - change.previous.double()

    # Keep all, the largest over the whole model (TIES), or a random part of each parameter (DARE).
    if merge.density == 1:
        return found
    if merge.how == "ties":
        sizes = torch.cat([tau.abs() for tau in found.values()])
        # The largest over the whole model, as the method's threshold is the task's and not a layer's.
        chosen = top(sizes, max(1, int(merge.density * sizes.numel())))
        for (name, tau), places in zip(found.items(), split(chosen, [t.numel() for t in found.values()]), strict=True):
            found[name] = torch.zeros_like(tau).index_copy_(0, places, tau[places])
        return found
    for name, tau in found.items():
        seed = hashlib.sha256(f"{merge.seed} {number} {name}".encode()).digest()[:8]
        # Each delta and parameter has its own draw, whatever others are merged with it.
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        drawn = torch.rand(tau.numel(), generator=generator, dtype=torch.float64) < merge.density
        found[name] = torch.where(drawn, tau / merge.density, 0.0)
    return found


def _merged(parts: Sequence[tuple[Change, float, Tensor]], merge: Merge, scale: float) -> Change:
    """Return the merged change of one parameter, times scale, at the union of the tasks' positions."""
    index = torch.cat([change.index for change, _, _ in parts]).unique()
    base = torch.empty(index.numel(), dtype=parts[0][0].values.dtype)
    weighted = torch.zeros(len(parts), index.numel(), dtype=torch.float64)
    weight = torch.zeros(len(parts), 1, dtype=torch.float64)
    for row, (change, of_task, tau) in reversed(list(enumerate(parts))):
        assert change.previous is not None
        # Positions are sorted, so bisection finds them.
        places = torch.searchsorted(index, change.index)
        base[places] = change.previous  # runs backwards, so the first task's value wins: it saw the base itself
        weighted[row, places] = of_task * tau
        weight[row] = of_task
    merged = _elected_mean(weighted, weight) if merge.how == "ties" else weighted.sum(0)
    values = (base.double() + scale * merged).to(base.dtype)
    # A change of 0 must keep the base's bits: -0.0 and NaN would not survive the sum.
    return Change(index, torch.where((merged == 0) | (scale == 0), base, values), base)


def _elected_mean(weighted: Tensor, weight: Tensor) -> Tensor:
    """Return, per element, the mean of the changes that have the elected sign (TIES, steps 2 and 3); else 0."""
    sign = weighted.sum(0).sign()
    agrees = (weighted.sign() == sign) & (weighted != 0)
    total = (weight * agrees).sum(0)
    return torch.where(total > 0, (weighted * agrees).sum(0) / total.clamp(min=1e-300), 0.0)
