"""The metadata that mask and delta files share."""

import json

from torch import Tensor

from piece_ds.checkpoint.fingerprint import checksum, model_fingerprint
from piece_ds.state.mask import Mask

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
