"""Refuse a model whose weights are not all finite: its first loss would be NaN, after the output folder was claimed."""

import torch
from torch import nn

from piece_ds.runtime.distributed import all_gather_objects
from piece_ds.runtime.errors import UserError


def refuse_nonfinite(source: str, model: nn.Module) -> None:
    """Raise UserError, on all ranks, if a parameter of model holds NaN or an infinite number. A collective.

    Args:
        source: what was loaded, for the message.
        model: whole, or partitioned by ZeRO-3: then each rank looks at its own part.
    Cost: one pass over the weights that this rank holds.
    """
    found = None
    for name, param in model.named_parameters():
        own = getattr(param, "ds_tensor", param).detach()
        # The largest absolute value: no mask as large as the weight is made, and NaN is passed on.
        if own.is_floating_point() and own.numel() and not bool(torch.linalg.vector_norm(own, float("inf")).isfinite()):
            found = name
            break
    names = [name for name in all_gather_objects(found) if name is not None]
    if names:
        raise UserError(f"{source}: {names[0]!r} holds NaN or infinite numbers: fetch the checkpoint again")
