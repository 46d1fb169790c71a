"""The metadata that mask and delta files share."""

import hashlib
import json
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout


def model_fingerprint(layout: Layout) -> str:
    """sha256 of every parameter's name and shape, in order: equal for equal architectures, whatever the weights."""
    structure = [[info.name, list(info.shape)] for info in layout.parameters]
    return hashlib.sha256(json.dumps(structure).encode()).hexdigest()


def checksum(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and bytes of CPU tensors, in name order."""
    return checksum_of(tensors, tensors.__getitem__)


def checksum_of(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """The same of tensors that read() gives one by one. Memory: one tensor."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(read(name).contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


VERSION = "1"


def describe(kind: str, mask: Mask, names: set[str], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Metadata (strings, as safetensors wants them) of a file of `kind` made for mask.

    Args:
        names: parameters that have something in the file.
        tensors: the file's content, for its checksum.
    """
    shapes = {name: list(shape) for name, shape in mask.layout.shapes().items() if name in names}
    return {
        "format": kind,
        "version": VERSION,
        "method": mask.method,
        "ratio": repr(mask.ratio),
        "selected": str(mask.num_selected),
        "total": str(mask.layout.total),
        "shapes": json.dumps(shapes),
        "model_fingerprint": model_fingerprint(mask.layout),
        "checksum": checksum(tensors),
    }
