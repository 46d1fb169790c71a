"""The delta between any two checkpoints of one architecture, such as a full fine-tune or an RL run."""

from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.delta_parts import CODINGS
from piece_ds.checkpoint.metadata import model_fingerprint
from piece_ds.deltas.delta import Change
from piece_ds.deltas.folder import ModelFolder
from piece_ds.deltas.scale import split, take
from piece_ds.deltas.write import top, write_delta
from piece_ds.runtime.errors import UserError
from piece_ds.state.weights_hash import hash_range, hexadecimal


def diff_folders(
    before: ModelFolder,
    after: ModelFolder,
    output: Path | str,
    ratio: float | None = None,
    *,
    coding: str = CODINGS[0],
) -> None:
    """Write the delta that leads from one model folder to another.

    Args:
        before: the model to start from.
        after: the model to reach; of the same architecture and dtypes.
        output: path of the delta.
        ratio: keep the max(1, int(ratio * elements of the model)) largest |changes|; ties go to the first in order of
            parameters and positions. None keeps every element whose bits differ, so applying gives `after` to the bit.
        coding: see write_parts().
    Raises:
        UserError: another architecture or dtype, a quantized tensor, equal weights, or a ratio outside (0, 1].
    Cost: reads both folders once. Memory: an index and two values per kept element: 8 bytes per parameter for a full
        fine-tune in bf16.
    """
    if ratio is not None and not 0 < ratio <= 1:
        raise UserError(f"ratio is {ratio}: expected a share of the model's elements, in (0, 1]")
    _check_alike(before, after)
    limit = None if ratio is None else max(1, int(ratio * before.layout.total))

    # Compare bits: NaN equals itself, -0.0 differs from 0.0. The base's fingerprint comes from the same pass.
    changes: dict[str, Change] = {}
    base = 0
    for info in before.layout.parameters:
        name = info.name
        first, second = before.bits_of(name), after.bits_of(name)
        base += hash_range(name, first)
        index = (first != second).nonzero().view(-1)
        dtype = before.stored[before.stored_as(name)[0]].dtype
        assert dtype is not None
        change = Change(index, second[index].view(dtype), first[index].view(dtype))
        # No parameter can contribute more than the whole budget: drop the rest now, for memory.
        if limit is not None and index.numel() > limit:
            change = take(change, top(_sizes(change), limit))
        changes[name] = change

    # The budget is the model's: the largest of all parameters' largest.
    if limit is not None:
        chosen = top(torch.cat([_sizes(change) for change in changes.values()]), limit)
        parts = split(chosen, [change.index.numel() for change in changes.values()])
        changes = {name: take(changes[name], places) for name, places in zip(changes, parts, strict=True)}

    # The result's fingerprint follows from the base's and the changes.
    metadata = {
        "method": "diff",
        "total": str(before.layout.total),
        "model_fingerprint": model_fingerprint(before.layout),
        "base_fingerprint": hexadecimal(base),
    }
    write_delta(output, changes, before.layout.shapes(), metadata, coding=coding)


def _sizes(change: Change) -> Tensor:
    assert change.previous is not None
    return (change.values.double() - change.previous.double()).abs()


def _check_alike(before: ModelFolder, after: ModelFolder) -> None:
    if before.layout.shapes() != after.layout.shapes():
        own, other = before.layout.shapes(), after.layout.shapes()
        name = next(n for n in [*own, *other] if own.get(n) != other.get(n))
        raise UserError(
            f"{before.root} and {after.root} are of different architectures: {name!r} has shape {own.get(name)} in one "
            f"and {other.get(name)} in the other"
        )
    for name in before.layout.shapes():
        dtypes = {f.stored[stored].dtype for f in (before, after) for stored in f.stored_as(name)}
        if len(dtypes) > 1 or None in dtypes:
            raise UserError(
                f"{name!r} is stored as {' and '.join(sorted(str(dtype) for dtype in dtypes))} in {before.root} and "
                f"{after.root}: save both models in one dtype, unquantized"
            )
