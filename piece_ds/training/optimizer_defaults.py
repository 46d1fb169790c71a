"""What some learning-rate schedules read of an optimizer, shown through the wrappers that DeepSpeed puts around it."""

from typing import Any


def show_defaults(optimizer: Any) -> None:
    """Give each wrapper around a torch optimizer the defaults of what it wraps, if it has none of its own."""
    wrappers = []
    while optimizer is not None and not isinstance(vars(optimizer).get("defaults"), dict):
        wrappers.append(optimizer)
        optimizer = vars(optimizer).get("optimizer")
    for wrapper in wrappers:
        if optimizer is not None and not isinstance(getattr(type(wrapper), "defaults", None), property):
            wrapper.defaults = optimizer.defaults
