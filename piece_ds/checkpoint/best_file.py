"""best.safetensors: the selected weights of a task's best step so far, in every checkpoint after it.

For each parameter: NAME.indices and NAME.values, in the parameter's dtype. The metadata are those of a mask file, plus
the step. Positions count over all ranks, so any number of ranks and any ZeRO stage read it.
"""

from pathlib import Path

import torch
from torch import Tensor

from piece_ds.checkpoint.artifact import BEST, index_tensor, open_artifact, write_artifact
from piece_ds.checkpoint.delta_file import own_part
from piece_ds.checkpoint.metadata import describe
from piece_ds.runtime.distributed import barrier, is_main
from piece_ds.state.mask import Mask, gather_fragments


def save_best(
    path: Path | str, mask: Mask, values: dict[str, Tensor], dtype_of: dict[str, torch.dtype], step: int
) -> None:
    """Write the selected weights of a step, whole. A collective; all ranks return when the file is there.

    Args:
        path: of the file.
        mask: of the task.
        values: read_selected() at that step.
        dtype_of: parameter name -> its dtype.
        step: number of optimizer steps before it.
    """
    index, whole = mask.whole(), gather_fragments(mask.layout, values, dtype_of)
    if is_main():
        numel = {info.name: info.numel for info in mask.layout.parameters}
        tensors = {f"{name}.indices": index_tensor(positions, numel[name]) for name, positions in index.items()}
        tensors |= {f"{name}.values": whole[name] for name in index}
        write_artifact(path, BEST, tensors, {**describe(mask, index), "step": str(step)})
    barrier()


def load_best(path: Path | str, mask: Mask) -> tuple[int, dict[str, Tensor]]:
    """Return the step and this rank's part of its selected weights.

    Raises:
        UserError: the file is missing, damaged or of another mask.
    """
    with open_artifact(path, BEST) as file:
        if file.metadata.step is None:
            raise file.refuse("metadata 'step' is missing")
        return file.metadata.step, own_part(file, "values", mask)
