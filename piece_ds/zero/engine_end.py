"""Do something when an engine is gone: what it needs as long as it lives cannot be undone before."""

import weakref
from collections.abc import Callable
from typing import Any


class EngineEnd:
    """Calls functions once, when an engine is destroyed or collected, whichever comes first; not when Python ends."""

    def __init__(self, engine: Any) -> None:
        """Watch an engine from here on.

        Args:
            engine: its destroy() is replaced. DeepSpeed keeps references to engines, so few are ever collected.
        """
        self._functions: list[Callable[[], None]] = []
        self._is_over = False
        end = weakref.finalize(engine, self._end)
        end.atexit = False

        # The engine holds itself by this. The collector sees that, and DeepSpeed's __del__ has to find its own method.
        destroy = engine.destroy

        def destroy_and_end() -> None:
            destroy()
            end()

        engine.destroy = destroy_and_end

    def call(self, function: Callable[[], None]) -> None:
        """Call function then; at once if the engine is gone already."""
        if self._is_over:
            function()
        else:
            self._functions.append(function)

    def _end(self) -> None:
        self._is_over = True
        functions, self._functions = self._functions, []
        for function in functions:
            function()
