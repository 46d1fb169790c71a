"""Which provider serves the ops on a device: chosen once per process, logged, never exchanged behind the caller's back.

PIECE_DS_BACKEND names it ('reference' and, per device, the compiled ones). Nothing is built or registered at import:
load() does it, when the first tensor of a device type arrives or earlier where a caller wants it (before
torch.compile, before timing).
"""

import logging
import os
from collections.abc import Callable

import torch

from piece_ds.errors import UserError, nearest
from piece_ds.ops import reference
from piece_ds.ops.schema import SCHEMAS

logger = logging.getLogger(__name__)

VARIABLE = "PIECE_DS_BACKEND"

# device type -> provider -> function that registers its kernels; the first one is the default.
_PROVIDERS: dict[str, dict[str, Callable[[], None]]] = {
    "cpu": {"reference": lambda: reference.register("cpu")},
    "cuda": {"reference": lambda: reference.register("cuda")},
}
_LOADED: dict[str, str] = {}  # device type -> provider in use


def load(device_type: str) -> str:
    """Register the kernels for tensors of device_type ('cpu', 'cuda') and return their provider's name.

    Raises:
        UserError: PIECE_DS_BACKEND names no provider of this device, or the provider cannot be built here.
    """
    if device_type not in _LOADED:
        name = _chosen(device_type)
        _PROVIDERS[device_type][name]()
        _LOADED[device_type] = name
        logger.info("piece_ds ops on %s: %s", device_type, name)
    return _LOADED[device_type]


def _chosen(device_type: str) -> str:
    if device_type not in _PROVIDERS:
        raise UserError(f"piece_ds has no kernels for device {device_type!r}: use one of {', '.join(_PROVIDERS)}")
    known = list(_PROVIDERS[device_type])
    name = os.environ.get(VARIABLE) or known[0]
    every = sorted({provider for rows in _PROVIDERS.values() for provider in rows})
    if name not in every:
        raise UserError(f"{VARIABLE}={name!r} is no provider; known: {', '.join(every)}.{nearest(name, every)}")
    # One variable serves both devices: 'triton' says nothing about the CPU, 'cpp' nothing about a GPU.
    return name if name in known else known[0]


def report() -> str:
    """A line per op: its provider on every device of this machine."""
    devices = [device for device in _PROVIDERS if device == "cpu" or torch.cuda.is_available()]
    names = {device: load(device) for device in devices}
    lines = [f"{'op':<20}" + "".join(f"{device:<14}" for device in devices)]
    lines += [f"{op:<20}" + "".join(f"{names[device]:<14}" for device in devices) for op in SCHEMAS]
    return "\n".join(lines)


def provider(op: str, device_type: str) -> str:
    """Name of the implementation that runs `op` on tensors of device_type ('cpu', 'cuda')."""
    if op not in SCHEMAS:
        raise ValueError(f"no op {op!r}; known: {', '.join(SCHEMAS)}")
    return load(device_type)
