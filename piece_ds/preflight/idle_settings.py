"""Say which settings of methods are given to a method that does not read them.

They are said and not refused: one file of settings may serve several methods that are compared.
"""

import logging

from piece_ds.config.method_arguments import READERS
from piece_ds.config.settings import Settings
from piece_ds.methods.method import Method
from piece_ds.runtime.distributed import is_main

logger = logging.getLogger(__name__)

# What only a selection of weights reads.
_OF_MASKS = ("mask_ratio", "update_mode", "selected_gradient", "importance_lambda")


def say_idle_settings(settings: Settings, method: Method) -> None:
    """Log one line about given settings that method does not read."""
    idle = idle_settings(settings, method)
    if idle and is_main():
        logger.warning("given, but without effect with --method %s: %s", method.name, ", ".join(idle))


def idle_settings(settings: Settings, method: Method) -> list[str]:
    """Return the flags of given settings that method does not read, each with the methods that do."""
    found = [
        f"--{name} (of {', '.join(READERS[name])})"
        for name in sorted(settings.given & READERS.keys())
        if method.name not in READERS[name]
    ]
    if not method.has_mask:
        found += [f"--{name} (of methods with a mask)" for name in _OF_MASKS if name in settings.given]
    return found
