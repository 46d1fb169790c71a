"""Files from outside are taken as they are: nothing is converted, and what does not fit is named in one line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from piece_ds.runtime.errors import UserError
from piece_ds.runtime.schema import Count, checked, read_json


@dataclass
class Entry:
    count: Count
    share: float
    name: str
    parts: list[int]
    known: bool | None = None


GOOD: dict[str, Any] = {"count": 3, "share": 1, "name": "x", "parts": [1, 2]}


def read(folder: Path, content: Any) -> Entry:
    path = folder / "entry.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_json(path, Entry, "entry", "write it again")


def test_what_fits_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, {**GOOD, "known": True, "other": 1}) == Entry(3, 1.0, "x", [1, 2], True)


def test_what_would_have_to_be_converted_is_refused_by_its_place(tmp_path: Path) -> None:
    for key, value in (
        ("count", "3"),
        ("count", 3.0),
        ("count", True),
        ("count", -1),
        ("count", 2**63),
        ("share", "0.5"),
        ("share", True),
        ("name", 3),
        ("name", None),
        ("parts", "12"),
        ("parts", ["1"]),
        ("parts", {"0": 1}),
        ("known", "yes"),
        ("known", 1),
    ):
        place = "parts.0" if value == ["1"] else key
        with pytest.raises(UserError, match=rf"^entry \S+/entry\.json: {place}: .*: write it again$"):
            read(tmp_path, {**GOOD, key: value})
    with pytest.raises(UserError, match="share: Field required: write it again"):
        read(tmp_path, {"count": 1})
    with pytest.raises(UserError, match=r"not JSON \(EOF"):
        read(tmp_path, "{")
    with pytest.raises(UserError, match="got a whole number of 301 bits"):
        read(tmp_path, {**GOOD, "count": 2**300})


def test_metadata_are_texts_and_converted_unless_that_is_refused() -> None:
    texts = {**GOOD, "count": "3"}
    assert checked(texts, Entry, "metadata", "copy it again") == Entry(3, 1.0, "x", [1, 2])
    assert checked({"a": "3"}, dict[str, int], "metadata", "copy it again") == {"a": 3}
    with pytest.raises(UserError, match=r"^metadata: a: .*, got '3': copy it again$"):
        checked({"a": "3"}, dict[str, int], "metadata", "copy it again", strict=True)
