"""Do something when an engine is gone: what it needs as long as it lives cannot be undone before."""

import weakref
from collections.abc import Callable
from typing import Any


def call_after(engine: Any, function: Callable[[], None]) -> None:
    """Call function once, when engine is destroyed or collected, whichever comes first; not when Python ends.

    Args:
        engine: its destroy() is replaced. DeepSpeed keeps references to engines, so few are ever collected.
    """
    once = weakref.finalize(engine, function)
    once.atexit = False
    # The replaced method must not keep the engine alive.
    found, replaced = weakref.ref(engine), vars(engine).get("destroy")

    def destroy_and_call() -> None:
        alive = found()
        if replaced is not None:
            replaced()
        elif alive is not None:
            type(alive).destroy(alive)
        once()

    engine.destroy = destroy_and_call
