"""What stands in the place of an object's method goes away again, and what others had set there comes back."""

import pytest

from piece_ds.runtime.overriding import override


class Thing:
    def name(self) -> str:
        return "the class's"


@pytest.mark.parametrize("is_set", [False, True])
def test_undo_restores_what_was_there(is_set: bool) -> None:
    thing = Thing()
    if is_set:
        thing.name = lambda: "another's"  # type: ignore[method-assign]
    undo = override(thing, "name", lambda: "ours")
    assert thing.name() == "ours"
    undo()
    assert thing.name() == ("another's" if is_set else "the class's")
    assert ("name" in vars(thing)) == is_set


def test_overrides_nest() -> None:
    thing = Thing()
    undo = override(thing, "name", lambda: "first")
    undo_second = override(thing, "name", lambda: "second")
    undo_second()
    assert thing.name() == "first"
    undo()
    assert "name" not in vars(thing)
