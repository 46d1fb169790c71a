"""delta.safetensors: what a task changed. For each parameter: NAME.indices, NAME.values and NAME.previous.

Values are absolute and in the parameter's dtype, so applying and reverting are bit-exact. A delta of 0.1 % of the
weights has a few thousandths of the size of a checkpoint. In 16 bits a selected value takes 8 bytes, or 6 without the
previous value. The metadata are those of a mask file, plus the fingerprints of all weights before (base_fingerprint)
and after (result_fingerprint).
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from piece_ds.checkpoint.artifact import DELTA, Artifact, open_artifact
from piece_ds.checkpoint.delta_parts import CODINGS, INDICES, read_change, write_parts
from piece_ds.checkpoint.metadata import describe
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask, gather_fragments
from piece_ds.state.weights_hash import bits_of, hash_elements, hexadecimal
from piece_ds.zero.weights import read_selected, weights_fingerprint


def save_delta(
    path: Path | str,
    model: nn.Module,
    mask: Mask,
    previous: dict[str, Tensor],
    with_previous: bool = True,
    *,
    unscaled: dict[str, Tensor] | None = None,
    scale: float = 1.0,
    chain: Mapping[str, str] | None = None,
    coding: str = CODINGS[0],
) -> None:
    """Write a task's delta from all ranks' parts. A collective; rank 0 writes, and all return when the file is there.

    Args:
        path: of the file.
        model: after the task.
        mask: the task's mask.
        previous: read_selected(model, mask) before the task.
        with_previous: store the previous values. Without them the file is smaller and cannot be reverted.
        unscaled: read_selected(model, mask) before the task's changes were multiplied by scale; None at scale 1.
        scale: factor of the task's changes.
        chain: metadata that say what the file follows on; see chain_metadata().
        coding: see write_parts().
    Cost: reads this rank's part of the weights once, for the fingerprints.
    """

    # Gather what all ranks hold. Every rank takes part.
    dtype_of = {name: param.dtype for name, param in model.named_parameters()}
    whole = mask.whole()
    all_values = gather_fragments(mask.layout, read_selected(model, mask), dtype_of)
    all_previous = gather_fragments(mask.layout, previous, dtype_of)
    all_unscaled = gather_fragments(mask.layout, unscaled, dtype_of) if unscaled is not None else {}
    surroundings = int(weights_fingerprint(model, mask))

    # One rank writes. All weights' fingerprint is that of the unselected ones plus that of the selected ones.
    if is_main():
        parts: dict[str, dict[str, Tensor]] = {}
        for name, index in whole.items():
            parts[name] = {"indices": index, "values": all_values[name]}
            if with_previous:
                parts[name]["previous"] = all_previous[name]
            if scale != 1.0:
                parts[name]["unscaled"] = all_unscaled[name]
        metadata = describe(mask, whole) | ({} if scale == 1.0 else {"scale": repr(scale)}) | dict(chain or {})
        for key, values in (("base_fingerprint", all_previous), ("result_fingerprint", all_values)):
            selected = sum(hash_elements(name, index, bits_of(values[name])) for name, index in whole.items())
            metadata[key] = hexadecimal(surroundings + selected)
        write_parts(path, parts, {info.name: info.numel for info in mask.layout.parameters}, metadata, coding)
    barrier()


def checksum_of(path: Path | str) -> str | None:
    """Return the checksum that a delta file names; None if there is no file, or none in it."""
    if not Path(path).is_file():
        return None
    with open_artifact(path, DELTA, verify=False) as file:
        return file.metadata.checksum


def chain_metadata(parent: str | None, step: int, link: int) -> dict[str, str]:
    """Return the metadata that say what a delta follows on.

    Together with base_fingerprint, they say what is missing or repeated.

    Args:
        parent: checksum of the delta before it; None for the first.
        step: optimizer steps of its task so far.
        link: its number in the chain, from 0.
    """
    return {"parent": parent or "", "step": str(step), "link": str(link)}


def load_previous(path: Path | str, mask: Mask) -> dict[str, Tensor]:
    """Return this rank's part of a delta file's previous values, for the selection of mask.

    Raises:
        UserError: the file is missing or of another mask.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing: the task cannot be resumed without the values it began with")
    with open_artifact(path, DELTA) as file:
        return own_part(file, "previous", mask)


def own_part(file: Artifact, part: str, mask: Mask) -> dict[str, Tensor]:
    """Return this rank's values of mask's elements from an open file of NAME.indices and NAME.PART.

    Raises:
        UserError: the file is of another mask.
    """
    values = {}
    for name, index in mask.index.items():
        own = read_change(file, name, file.metadata.numel(name), (part,))
        whole, found = own[INDICES], own[part]
        # A rank's part of a parameter's positions is one run of them.
        begin = int(torch.searchsorted(whole, index[0]))
        if found.shape != whole.shape or not torch.equal(whole[begin : begin + index.numel()], index):
            raise UserError(f"{file.path} does not belong to this task's mask: {name!r} has other indices")
        values[name] = found[begin : begin + index.numel()]
    return values
