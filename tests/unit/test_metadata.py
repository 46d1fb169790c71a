"""Entries of a file's metadata that contradict each other are found, whichever of them is too large."""

import json
import re

import pytest

from piece_ds.checkpoint.metadata import Metadata


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        ({"total": "10", "selected": "10", "shapes": json.dumps({"a": [2, 5]})}, None),
        ({"total": "10", "selected": "11", "shapes": json.dumps({"a": [2, 2]})}, "total is 10 .* 11 selected"),
        ({"total": "10", "selected": "1", "shapes": json.dumps({"a": [2, 5], "b": [1]})}, "11 in its shapes"),
        ({"total": "0", "selected": "0"}, "total is 0"),
        ({"selected": "11"}, None),
        ({"ratio": "0"}, r"ratio is 0, expected a share in \(0, 1\]"),
        ({"ratio": "1.5"}, "ratio is 1.5"),
        ({"ratio": "1.0"}, None),
    ],
)
def test_sizes_that_cannot_be_are_found(entries: dict[str, str], found: str | None) -> None:
    said = Metadata.model_validate({"format": "piece-delta", "version": "1", **entries}).contradiction()
    assert said is None if found is None else re.search(found, said or ""), said
