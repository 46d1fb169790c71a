"""layout_of(model): every parameter once"""

import torch
from torch import nn

from piece_ds.models.eligible import ineligible
from piece_ds.runtime.distributed import rank, world_size
from piece_ds.state.partition import Layout, ParameterInfo
from piece_ds.state.selected_values import PARAMETER_NAME, selected_values


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also where ZeRO-3 has put it away."""
    return tuple(getattr(param, "ds_shape", param.shape))


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of model for this rank of the default process group.

    Not eligible: what ineligible() names and parameters that do not require gradients. A model prepared for compact
    mode has the layout that it had before.
    """
    left_out = ineligible(model)
    values = selected_values(model)
    infos = []
    for name, param in model.named_parameters():
        if values is not None and name == PARAMETER_NAME:
            continue
        shape = full_shape(param)
        numel = int(torch.Size(shape).numel())
        eligible = (param.requires_grad and name not in left_out) if values is None else name in values.eligible
        infos.append(ParameterInfo(name, shape, numel, eligible))
    return Layout(tuple(infos), rank(), world_size())
