"""Items of a JSON list one at a time, with the line number of what does not parse.

json.loads would hold every row as Python objects at once, several times the size of the text.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from piece_ds.errors import UserError

WHITESPACE = " \t\r\n"


def list_items(text: str, path: Path) -> Iterator[Any]:
    """Items of the JSON list in text, decoded one at a time so that only the text itself is held whole."""
    decoder = json.JSONDecoder()
    index = _skip_space(text, 0)
    if index == len(text):
        return
    if text[index] != "[":
        raise _malformed(path, text, index, "expected a list of rows")
    index = _skip_space(text, index + 1)
    while text[index : index + 1] != "]":
        try:
            item, index = decoder.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise _malformed(path, text, error.pos, error.msg) from None
        except RecursionError:
            raise _malformed(path, text, index, "nested too deeply") from None
        yield item
        index = _skip_space(text, index)
        if text[index : index + 1] == ",":
            index = _skip_space(text, index + 1)
            if text[index : index + 1] == "]":
                raise _malformed(path, text, index, "comma before the end of the list")
        elif text[index : index + 1] != "]":
            raise _malformed(path, text, index, "expected , or ] after a row")
    if _skip_space(text, index + 1) != len(text):
        raise _malformed(path, text, _skip_space(text, index + 1), "text after the list")


def _skip_space(text: str, index: int) -> int:
    """Index of the first character from index on that is not JSON white space, or the length of text."""
    while index < len(text) and text[index] in WHITESPACE:
        index += 1
    return index


def _malformed(path: Path, text: str, index: int, reason: str) -> UserError:
    """The error for text[index], with its line number."""
    return UserError(f"{path} line {text.count(chr(10), 0, index) + 1}: malformed JSON ({reason}); fix the file")
