"""The layout of a model: every parameter once, with its full shape and whether it may be selected."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from piece_ds.models.eligible import ineligible
from piece_ds.runtime.distributed import rank, world_size
from piece_ds.state.partition import Layout, ParameterInfo
from piece_ds.state.selected_values import PARAMETER_NAME, selected_values


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, even if ZeRO-3 has partitioned it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of model for this rank of the default process group.

    A parameter is eligible if ineligible() does not name it and it requires gradients. A model prepared for compact
    mode keeps the layout that it had before.
    """
    left_out = ineligible(model)
    values = selected_values(model)
    in_first = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    infos = []
    for name, param in model.named_parameters():
        # Compact mode's own parameter is no parameter of the model.
        if values is not None and name == PARAMETER_NAME:
            continue
        shape = full_shape(param)
        numel = int(torch.Size(shape).numel())
        # Compact mode freezes all weights, so requires_grad says nothing then.
        eligible = (param.requires_grad and name not in left_out) if values is None else name in values.eligible
        infos.append(ParameterInfo(name, shape, numel, eligible, id(param) in in_first))
    return Layout(tuple(infos), rank(), world_size())
