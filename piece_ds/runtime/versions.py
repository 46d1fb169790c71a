"""Versions of the software and the device that results depend on."""

import platform
import sys

import accelerate
import deepspeed
import torch
import transformers


def versions() -> dict[str, str]:
    """Return name -> version of the packages that results depend on, of Python, and the name of the device."""
    from piece_ds import __version__  # when called: the package imports this module

    modules = {"torch": torch, "deepspeed": deepspeed, "transformers": transformers, "accelerate": accelerate}
    found = {"piece_ds": __version__}
    found |= {name: str(module.__version__) for name, module in modules.items()}
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {**found, "python": sys.version.split()[0], "device": device}
