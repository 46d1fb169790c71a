"""Choose the provider of the ops on a device: once per process, logged, and never changed without the caller.

PIECE_DS_BACKEND names it ('reference' and, per device, the compiled ones). PIECE_DS_ISA names the instruction set of
the C++ one ('avx512', 'avx2', 'scalar'; else the best one). Nothing is built or registered at import. load() does it
when the first tensor of a device type arrives, or earlier if a caller asks (before torch.compile, before timing).
"""

import ctypes
import logging
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor

from piece_ds.ops import reference
from piece_ds.ops.extension import load_extension
from piece_ds.ops.schema import SCHEMAS
from piece_ds.runtime.errors import UserError, nearest

logger = logging.getLogger(__name__)

VARIABLE = "PIECE_DS_BACKEND"
ISA_VARIABLE = "PIECE_DS_ISA"


def _load_cpp() -> str:
    library = load_extension("cpu")
    return f"cpp, {select_isa(library, os.environ.get(ISA_VARIABLE, ''))}"


def _load_cuda() -> str:
    load_extension("cuda")
    return "cuda"


def _load_triton() -> str:
    import_module("piece_ds.kernels.provider").register()
    return "triton"


def _load_reference(device_type: str) -> str:
    reference.register(device_type)
    return "reference"


# device type -> provider -> function that registers its kernels and describes them; the first one is the default.
_PROVIDERS: dict[str, dict[str, Callable[[], str]]] = {
    "cpu": {"cpp": _load_cpp, "reference": lambda: _load_reference("cpu")},
    "cuda": {"cuda": _load_cuda, "triton": _load_triton, "reference": lambda: _load_reference("cuda")},
}
_LOADED: dict[str, str] = {}  # device type -> provider in use


def load(device_type: str) -> str:
    """Register the kernels for tensors of device_type ('cpu', 'cuda') and return their provider's name.

    Raises:
        UserError: PIECE_DS_BACKEND names no provider, or the provider cannot be built on this machine.
    """
    if device_type not in _LOADED:
        name = _chosen(device_type)
        description = _PROVIDERS[device_type][name]()
        _LOADED[device_type] = name
        logger.info("piece_ds ops on %s: %s", device_type, description)
    return _LOADED[device_type]


def load_for(tensor: Tensor) -> None:
    """Load the provider for a tensor's device."""
    # Asking a device for its type takes 20 us with cold caches; these two flags are cheaper.
    load("cpu" if tensor.is_cpu else "cuda" if tensor.is_cuda else tensor.device.type)


def select_isa(library: Path, name: str) -> str:
    """Make the C++ provider use the instruction set `name`, or the best one if it is empty; return its name.

    Raises:
        UserError: there is no such set, or the processor lacks it.
    """
    select = ctypes.CDLL(str(library)).piece_ds_select_isa
    select.argtypes, select.restype = [ctypes.c_char_p], ctypes.c_char_p
    selected = select(name.encode())
    if selected is None:
        raise UserError(f"{ISA_VARIABLE}={name!r}: expected avx512, avx2 or scalar, and a processor that has it")
    return selected.decode()


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


def providers(device_type: str) -> list[str]:
    """Return the names of the providers that can serve a device ('cpu', 'cuda'), the default first."""
    return list(_PROVIDERS[device_type])


def report() -> str:
    """Return a line per op: its provider on every device of this machine."""
    devices = [device for device in _PROVIDERS if device == "cpu" or torch.cuda.is_available()]

    # Loading shows what would really run, not what is configured.
    names = {device: load(device) for device in devices}
    lines = [f"{'op':<20}" + "".join(f"{device:<14}" for device in devices)]
    lines += [f"{op:<20}" + "".join(f"{names[device]:<14}" for device in devices) for op in SCHEMAS]
    return "\n".join(lines)


def provider(op: str, device_type: str) -> str:
    """Return the name of the provider that runs `op` on tensors of device_type ('cpu', 'cuda').

    Raises:
        ValueError: there is no such op.
    """
    if op not in SCHEMAS:
        raise ValueError(f"no op {op!r}; known: {', '.join(SCHEMAS)}")
    return load(device_type)
