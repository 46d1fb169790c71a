"""torch's deterministic algorithms: switched on for a while, then as they were, and what to do where there is none.

Some backward passes on CUDA, attention's among them, add with atomics: in another order, and so to other bits, in every
run. torch has other forms of most of them, which it takes on request.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from piece_ds.runtime.errors import UserError

# Two buffers of 4 MiB: the larger of the settings that cuBLAS knows as deterministic.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_SWITCH = "use_deterministic_algorithms"
_NAME = re.compile(r"^\s*([\w.:]+) does not have a deterministic implementation")


def set_cublas_workspace() -> None:
    """Give cuBLAS a workspace with which products are deterministic, unless the user has set one.

    Commands call it before CUDA starts. Later it is still right to call: torch asks for the variable at every product,
    and gives each stream a workspace of its own, which is what cuBLAS needs to repeat its bits.
    """
    os.environ.setdefault(*CUBLAS_WORKSPACE)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, torch takes deterministic algorithms and raises RuntimeError where there is none; then as before.

    New tensors are not filled: that is for finding programs that read what nobody wrote, and costs a write of each.
    """
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    set_cublas_workspace()
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def nondeterministic_operation(error: BaseException) -> str | None:
    """The operation that torch refused for want of a deterministic form, or None if error is about something else."""
    message = str(error)
    if not isinstance(error, RuntimeError) or _SWITCH not in message:
        return None
    found = _NAME.search(message)
    return found.group(1) if found else " ".join(message.split())[:120]


@contextmanager
def deterministic_run(wanted: bool) -> Iterator[None]:
    """deterministic_algorithms() around a run that was asked to be so; nothing if not wanted.

    Raises:
        UserError: the run met an operation that has no deterministic form.
    """
    if not wanted:
        yield
        return
    with deterministic_algorithms():
        try:
            yield
        except RuntimeError as error:
            operation = nondeterministic_operation(error)
            if operation is None:
                raise
            raise UserError(
                f"--deterministic: {operation} has no deterministic form in torch on this device: choose another "
                "--attn_implementation or model, or train without --deterministic"
            ) from error
