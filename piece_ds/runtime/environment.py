"""Keep environment variables as the user has set them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def environment_kept(*names: str) -> Iterator[None]:
    """Restore variables on exit: to their value on entry, or to none."""
    kept = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
