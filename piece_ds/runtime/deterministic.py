"""Switch torch's deterministic algorithms on for a while, and explain an operation that has none.

Some backward passes on CUDA, such as attention's, add with atomics. Every run adds in another order, so the bits
differ. torch has deterministic forms of most of these operations, which it uses on request.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from piece_ds.runtime.errors import UserError

# Eight buffers of 4096 KiB: the larger of the two settings that make cuBLAS deterministic.
CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_SWITCH = "use_deterministic_algorithms"
_NAME = re.compile(r"^\s*([\w.:]+) does not have a deterministic implementation")


def set_cublas_workspace() -> None:
    """Give cuBLAS a workspace that makes products deterministic, unless the user has set one.

    Commands call this before CUDA starts. A later call still works: torch reads the variable at every product. It gives
    each stream a workspace of its own, which is what cuBLAS needs to repeat its bits.
    """
    os.environ.setdefault(*CUBLAS_WORKSPACE)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Make torch use deterministic algorithms inside; afterwards restore its settings.

    torch raises RuntimeError for an operation that has no deterministic form. New tensors are not filled: that serves
    to find programs that read uninitialized memory, and costs one write of each tensor.
    """
    settings = torch.utils.deterministic
    # The caller may have its own settings.
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
    """Return the operation that torch refused because it has no deterministic form;

    None if error is about something else.
    """
    message = str(error)
    if not isinstance(error, RuntimeError) or _SWITCH not in message:
        return None
    found = _NAME.search(message)
    return found.group(1) if found else " ".join(message.split())[:120]


@contextmanager
def deterministic_run(wanted: bool) -> Iterator[None]:
    """Use deterministic_algorithms() inside if wanted, else do nothing.

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
