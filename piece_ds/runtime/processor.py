"""Know what the processor multiplies slowly."""

import platform

import torch
from deepspeed.accelerator import get_accelerator

_X86 = ("x86_64", "amd64")


def bf16_is_slow() -> bool:
    """Return whether models run here on an x86 processor without AVX-512.

    PyTorch has no kernels for a product of bf16 numbers there. On an AMD EPYC with AVX2 a linear layer of 512 rows and
    576 x 1536 weights takes 7 times as long in bf16 as in fp32.
    """
    on_cpu = get_accelerator().device_name() == "cpu"
    return on_cpu and platform.machine().lower() in _X86 and torch.backends.cpu.get_cpu_capability() != "AVX512"
