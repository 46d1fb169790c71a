"""delta.safetensors: what a task changed. For each parameter: NAME.indices, NAME.values and NAME.previous.

Values are absolute and in the parameter's dtype, so applying and reverting are bit-exact. A delta of 0.1 % of the
weights has a few thousandths of the size of a checkpoint. In 16 bits a selected value takes 8 bytes, or 6 without the
previous value. The metadata are those of a mask file, plus the fingerprints of all weights before (base_fingerprint)
and after (result_fingerprint).
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from piece_ds.checkpoint.artifact import DELTA, check_index, index_tensor, open_artifact, write_artifact
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
        tensors: dict[str, Tensor] = {}
        numel = {info.name: info.numel for info in mask.layout.parameters}
        for name, index in whole.items():
            tensors[f"{name}.indices"] = index_tensor(index, numel[name])
            tensors[f"{name}.values"] = all_values[name]
            if with_previous:
                tensors[f"{name}.previous"] = all_previous[name]
            if scale != 1.0:
                tensors[f"{name}.unscaled"] = all_unscaled[name]
        metadata = describe(mask, whole) | ({} if scale == 1.0 else {"scale": repr(scale)})
        for key, values in (("base_fingerprint", all_previous), ("result_fingerprint", all_values)):
            selected = sum(hash_elements(name, index, bits_of(values[name])) for name, index in whole.items())
            metadata[key] = hexadecimal(surroundings + selected)
        write_artifact(path, DELTA, tensors, metadata)
    barrier()


def load_previous(path: Path | str, mask: Mask) -> dict[str, Tensor]:
    """Return this rank's part of a delta file's previous values, for the selection of mask.

    Raises:
        UserError: the file is missing or of another mask.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is missing: the task cannot be resumed without the values it began with")
    values = {}
    with open_artifact(path, DELTA) as file:
        for name, index in mask.index.items():
            whole, previous = file.tensor(f"{name}.indices"), file.tensor(f"{name}.previous")
            check_index(file, name, whole, None)
            # A rank's part of a parameter's positions is one run of them.
            begin = int(torch.searchsorted(whole.long(), index[0]))
            if previous.shape != whole.shape or not torch.equal(whole[begin : begin + index.numel()].long(), index):
                raise UserError(f"{path} does not belong to this task's mask: {name!r} has other indices")
            values[name] = previous[begin : begin + index.numel()]
    return values
