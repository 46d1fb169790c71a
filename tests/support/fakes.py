"""Fakes in the place of functions, which take no arguments but those that the real ones take."""

from typing import Any
from unittest import mock

import pytest


def faked(patch: pytest.MonkeyPatch, module: Any, *names: str) -> mock.Mock:
    """Put a fake with the real one's signature in the place of each named function of a module, and return them.

    Returns:
        The fakes, as attributes of a mock that keeps the order of their calls.
    """
    fakes = mock.Mock()
    for name in names:
        fakes.attach_mock(mock.create_autospec(getattr(module, name)), name)
        patch.setattr(module, name, getattr(fakes, name))
    return fakes
