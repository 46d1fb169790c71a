"""delta.safetensors: what a task changed. Per parameter NAME.indices, NAME.values and NAME.previous.

Values are absolute, in the parameter's dtype, so that applying and reverting are bit-exact; a delta of 0.1 % of the
weights is a few thousandths of a checkpoint: in 16 bits 8 bytes a selected value, 6 without the previous ones. Metadata
as in a mask file, and the fingerprints of all weights before (base_fingerprint) and after (result_fingerprint).
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
    """Write a task's delta from all ranks' shares. A collective; rank 0 writes, all return when the file is there.

    Args:
        model: after the task.
        mask: the task's mask.
        previous: read_selected(model, mask) before the task.
        unscaled: read_selected(model, mask) before the task's changes were multiplied by scale; None at scale 1.
        scale: what they were multiplied by.
        with_previous: keep the previous values in the file; without them it is smaller and cannot be reverted.
    Cost: reads this rank's share of the weights once, for the fingerprints.
    """
    dtype_of = {name: param.dtype for name, param in model.named_parameters()}
    whole = mask.whole()
    all_values = gather_fragments(mask.layout, read_selected(model, mask), dtype_of)
    all_previous = gather_fragments(mask.layout, previous, dtype_of)
    all_unscaled = gather_fragments(mask.layout, unscaled, dtype_of) if unscaled is not None else {}
    surroundings = int(weights_fingerprint(model, mask))
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
    """This rank's share of a delta file's previous values, for the selection of mask.

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
            begin = int(torch.searchsorted(whole.long(), index[0]))
            if previous.shape != whole.shape or not torch.equal(whole[begin : begin + index.numel()].long(), index):
                raise UserError(f"{path} does not belong to this task's mask: {name!r} has other indices")
            values[name] = previous[begin : begin + index.numel()]
    return values
