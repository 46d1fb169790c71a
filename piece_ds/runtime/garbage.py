"""Collections of garbage that leave imports alone: while they are made, and in every later one."""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_WAITING = [False]  # whether collections wait for freeze_imports()


@contextmanager
def no_collections() -> Iterator[None]:
    """Collect no garbage inside, until freeze_imports() says that all is imported.

    torch and its friends make half a million objects that stay. 1,300 collections find nothing among them, and take a
    sixth of the imports' time: 2 of 12 s. A process that collects nothing by its own choice goes on so.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _WAITING[0] = True
    try:
        yield
    finally:
        _collect_again()


def freeze_imports() -> None:
    """Leave everything that is there now out of all further collections, in this process and its forks.

    Half a million objects of torch and its friends take 0.3 to 0.9 s each time, and a task asks about four times.
    """
    gc.freeze()
    # Else Triton's bindings tell at the end of the process of all that was never freed.
    atexit.register(gc.unfreeze)
    _collect_again()


def _collect_again() -> None:
    if _WAITING[0]:
        _WAITING[0] = False
        gc.enable()
