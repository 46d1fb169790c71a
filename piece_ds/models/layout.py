"""The layout of a model: every parameter once, with its full shape and whether it may be selected."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from piece_ds.models.eligible import eligible_rows, ineligible
from piece_ds.runtime.distributed import rank, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.state.partition import Layout, ParameterInfo
from piece_ds.state.selected_values import PARAMETER_NAME, selected_values

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the whole parameter, even if ZeRO-3 has partitioned it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def require_plain_weights(model: nn.Module) -> None:
    """Raise UserError if the model is quantized, or keeps weights as anything but numbers of one floating dtype each.

    Their gradients could not be formed weight by weight, and only what is left (norms, mostly) would be selected.
    """
    remedy = "load the checkpoint that it was made from, or a dequantized copy (model.dequantize())"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None or getattr(model, "is_quantized", False):
        method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", "an unknown method")
        raise UserError(
            f"{type(model).__name__} is quantized ({getattr(method, 'value', method)}), and a mask needs weights that "
            f"can be trained one by one: {remedy}"
        )
    for name, param in model.named_parameters():
        if param.dtype not in _DTYPES:
            raise UserError(f"{name!r} is stored as {param.dtype}, so the model is quantized: {remedy}")
        if type(param.data) is not Tensor:
            raise UserError(
                f"{name!r} is a {type(param.data).__name__}, expected a plain tensor: a model that is quantized or "
                f"split by another library has no weights that a mask can name; {remedy}"
            )


def layout_of(model: nn.Module) -> Layout:
    """Return the layout of model for this rank of the default process group.

    A parameter is eligible if ineligible() does not name it and it requires gradients. A model prepared for compact
    mode keeps the layout that it had before.

    Raises:
        UserError: see require_plain_weights().
    """
    require_plain_weights(model)
    left_out, rows = ineligible(model), eligible_rows(model)
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
        infos.append(ParameterInfo(name, shape, numel, eligible, id(param) in in_first, rows.get(name)))
    return Layout(tuple(infos), rank(), world_size())
