"""Collect the whole model's state on rank 0, as save_pretrained() wants it, under any ZeRO stage and configuration."""

from typing import Any

from torch import Tensor, nn

from piece_ds.runtime.distributed import is_main
from piece_ds.zero.weights import read_whole


def whole_state(engine: Any) -> dict[str, Tensor]:
    """Return every tensor of the model's state_dict() once, whole, on rank 0's CPU; {} elsewhere. A collective.

    Tied weights are in it under the one name that is not tied to another, as in transformers' own files. DeepSpeed's
    setting stage3_gather_16bit_weights_on_model_save is not needed.

    Cost: under ZeRO-3 one all-gather a parameter, with one of them at a time on the device. Rank 0's host holds the
    model.
    """
    model: nn.Module = engine.module
    state: dict[str, Tensor] = {}
    for name, tensor in _once(model).items():
        # Buffers and parameters that ZeRO-3 has not partitioned are whole already.
        whole = tensor
        if hasattr(tensor, "ds_id"):
            whole = read_whole(tensor, engine.device).view(tensor.ds_shape)
        if is_main():
            state[name] = whole.detach().cpu()
    return state


def _once(model: nn.Module) -> dict[str, Any]:
    """Return the model's state_dict() with each tensor under one name."""
    every = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found: dict[str, Any] = {}
    seen: set[int] = set()
    # A weight's own name before those that are tied to it.
    for name in sorted(every, key=lambda name: name in tied):
        if isinstance(every[name], Tensor) and id(every[name]) not in seen:
            seen.add(id(every[name]))
            found[name] = every[name]
    return {name: found[name] for name in every if name in found}
