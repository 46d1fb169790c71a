"""What PieceCallback cannot do with a setting is said when it is made, not found out after the pass over the data."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from piece_ds import PieceCallback
from piece_ds.runtime.errors import UserError


def test_a_step_scale_is_refused_since_no_general_statistics_are_there() -> None:
    trainer = cast(Any, SimpleNamespace(model=None, optimizer=None))
    with pytest.raises(UserError, match="takes no step_scale"):
        PieceCallback(trainer, step_scale="general")
