"""Compose a stack of deltas into one delta with the same effect."""

import json
from collections.abc import Sequence
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.delta_parts import CODINGS, write_parts
from piece_ds.deltas.delta import Change, Delta
from piece_ds.deltas.record import refuse_again
from piece_ds.runtime.errors import UserError


def compose(deltas: Sequence[Delta], output: Path | str, with_previous: bool = True, coding: str = CODINGS[0]) -> None:
    """Write the delta that equals applying deltas in order: last value and first previous value at each position.

    Args:
        deltas: consecutive deltas of one stack. A single one is rewritten, for instance without its previous values.
        output: path of the new delta.
        with_previous: keep previous values, so that the result can be reverted.
        coding: see write_parts(). A single delta is rewritten in it.
    Raises:
        UserError: the deltas are of different models or dtypes, or not consecutive.
    Memory: the result.
    """

    # Check that each delta continues where the one before ended.
    first, last = deltas[0], deltas[-1]
    for number, (before, after) in enumerate(pairwise(deltas)):
        _check_consecutive(before, after, deltas[: number + 1])
    shapes = _common_shapes(deltas)
    names = list(shapes)
    keep_previous = with_previous and all(delta.reversible for delta in deltas)
    if with_previous and not keep_previous:
        raise UserError("a delta without previous values is among those to compose: add --without_previous")

    # Overlay the changes, parameter by parameter.
    parts: dict[str, dict[str, Tensor]] = {}
    for name in names:
        changes = [delta.change(name) for delta in deltas if name in delta.shapes]
        index, values, previous = _overlay(name, changes)
        parts[name] = {"indices": index, "values": values}
        if keep_previous and previous is not None:
            parts[name]["previous"] = previous

    # The result starts from the first delta's base and ends at the last one's result.
    selected = sum(own["indices"].numel() for own in parts.values())
    inherited = {key: value for key, value in first.metadata.items() if key != "scale"}
    metadata = inherited | {
        "method": "+".join(dict.fromkeys(delta.metadata.get("method", "unknown") for delta in deltas)),
        "ratio": repr(selected / int(first.metadata["total"])) if "total" in first.metadata else "nan",
        "selected": str(selected),
        "shapes": json.dumps(shapes),
    }
    if last.result_fingerprint is not None:
        metadata["result_fingerprint"] = last.result_fingerprint
    if "step" in last.metadata:
        metadata["step"] = last.metadata["step"]
    write_parts(output, parts, {name: prod(shapes[name]) for name in names}, metadata, coding)


def _check_consecutive(before: Delta, after: Delta, given: Sequence[Delta]) -> None:
    if before.metadata.get("model_fingerprint") != after.metadata.get("model_fingerprint"):
        raise UserError(f"deltas {before.path} and {after.path} are of different models")
    if None in (before.result_fingerprint, after.base_fingerprint):
        raise UserError(
            f"delta {after.path if after.base_fingerprint is None else before.path} has no fingerprints: "
            "nothing can show that it belongs to this stack"
        )
    if before.result_fingerprint != after.base_fingerprint:
        refuse_again(after, given)
        raise UserError(
            f"delta {after.path} does not follow {before.path}: it was made on weights "
            f"{after.base_fingerprint}, that one leaves {before.result_fingerprint}; give consecutive "
            "deltas of one run, in task order"
        )


def _common_shapes(deltas: Sequence[Delta]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that a delta changes, in the order in which they first appear.

    Raises:
        UserError: two deltas, neighbours or not, give a parameter different shapes or dtypes.
    """
    origin: dict[str, Delta] = {}
    for delta in deltas:
        for name, shape in delta.shapes.items():
            other = origin.setdefault(name, delta)
            if other.shapes[name] != shape:
                raise UserError(
                    f"deltas {other.path} and {delta.path} are of different models: {name!r} has shape "
                    f"{list(other.shapes[name])} in one and {list(shape)} in the other"
                )
            if other.dtypes[name] != delta.dtypes[name]:
                raise UserError(
                    f"deltas {other.path} and {delta.path} hold values of different dtypes: {name!r} is "
                    f"{other.dtypes[name]} in one and {delta.dtypes[name]} in the other"
                )
    return {name: delta.shapes[name] for name, delta in origin.items()}


def _overlay(name: str, changes: Sequence[Change]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (ascending positions, last values, first previous values or None) of one parameter."""
    index = torch.cat([change.index for change in changes]).unique()
    values = torch.empty(index.numel(), dtype=changes[0].values.dtype)
    # Forwards, so that the last value wins.
    for change in changes:
        values[torch.searchsorted(index, change.index)] = change.values
    previous = None
    if all(change.previous is not None for change in changes):
        previous = torch.empty_like(values)
        # Backwards, so that the first previous value wins.
        for change in reversed(changes):
            assert change.previous is not None
            previous[torch.searchsorted(index, change.index)] = change.previous
    return index, values, previous
