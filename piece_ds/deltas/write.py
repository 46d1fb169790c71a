"""Write a delta that was computed from other deltas or from two models, with complete metadata."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.delta_parts import CODINGS, write_parts
from piece_ds.deltas.delta import Change, Delta
from piece_ds.runtime.errors import UserError
from piece_ds.state.weights_hash import bits_of, hash_elements, hexadecimal


def write_delta(
    output: Path | str,
    changes: Mapping[str, Change],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
    scale: float = 1.0,
    *,
    coding: str = CODINGS[0],
) -> None:
    """Write changes as a delta file, whole.

    Args:
        output: path of the file.
        changes: parameter name -> change with previous values. Empty changes are left out.
        shapes: of at least these parameters.
        metadata: method, total, model_fingerprint and base_fingerprint, as far as they are known.
        scale: factor of the changes. Unless it is 1, changes carry the unscaled values too.
        coding: see write_parts().
    Raises:
        UserError: nothing changes, or a value is too large for its dtype.
    """
    kept = {name: change for name, change in changes.items() if change.index.numel()}
    if not kept:
        raise UserError(f"{output} is not written: the delta would change no element")

    # Collect the tensors, and how the changes move the fingerprint of all weights.
    parts: dict[str, dict[str, Tensor]] = {}
    difference = 0
    for name, change in kept.items():
        assert change.previous is not None
        # A finite value that became infinite would destroy the model unnoticed.
        if bool((change.values.isinf() & change.previous.isfinite() & _finite(change.unscaled)).any()):
            raise UserError(f"{output} is not written: a value of {name!r} is too large for {change.values.dtype}")
        parts[name] = {"indices": change.index, "values": change.values, "previous": change.previous}
        if scale != 1.0:
            assert change.unscaled is not None
            parts[name]["unscaled"] = change.unscaled
        difference += hash_elements(name, change.index, bits_of(change.values))
        difference -= hash_elements(name, change.index, bits_of(change.previous))

    # What depends on the changes is written anew; the rest of the metadata is inherited.
    selected = sum(change.index.numel() for change in kept.values())
    described = dict(metadata) | {
        "ratio": repr(selected / int(metadata["total"])) if "total" in metadata else "nan",
        "selected": str(selected),
        "shapes": json.dumps({name: list(shapes[name]) for name in kept}),
    }
    described.pop("scale", None)
    described.pop("result_fingerprint", None)
    if scale != 1.0:
        described["scale"] = repr(scale)
    if "base_fingerprint" in metadata:
        described["result_fingerprint"] = hexadecimal(int(metadata["base_fingerprint"], 16) + difference)
    write_parts(output, parts, {name: prod(shapes[name]) for name in kept}, described, coding)


def _finite(values: Tensor | None) -> Tensor:
    return torch.tensor(True) if values is None else values.isfinite()


def require_previous(delta: Delta, what: str) -> None:
    """Raise UserError unless a delta holds previous values, which `what` needs."""
    if not delta.reversible:
        raise UserError(f"delta {delta.path} has no previous values, which {what} needs")


def top(scores: Tensor, k: int) -> Tensor:
    """Return the ascending places of the k highest scores. Ties go to the first; NaN counts as 0."""
    order = torch.sort(scores.nan_to_num(nan=0.0), descending=True, stable=True).indices
    return order[:k].sort().values
