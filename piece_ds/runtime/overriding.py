"""Put a function in the place of an object's method, and take it away again."""

from collections.abc import Callable
from typing import Any

_NOTHING = object()


def override(instance: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Set function on an instance in place of its method; return undo.

    Undo gives back what somebody else had set on the instance before, or the class's method if nobody had.
    """
    before = vars(instance).get(name, _NOTHING)
    setattr(instance, name, function)

    def undo() -> None:
        if before is _NOTHING:
            vars(instance).pop(name, None)
        else:
            setattr(instance, name, before)

    return undo
