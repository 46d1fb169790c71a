"""What one row of a data file may be: a prompt and an answer, token ids and labels, or plain text.

Every rule about a row's keys, types and emptiness stands here, so that a file of any format fails with the same words.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Features, Sequence, Value

from piece_ds.runtime.errors import UserError

IGNORED_LABEL = -100  # torch's and transformers' ignore_index

PAIR = "pair"
TOKENS = "tokens"
TEXT = "text"
KEYS = {PAIR: ("prompt", "answer"), TOKENS: ("input_ids", "labels"), TEXT: ("text",)}
FEATURES = {
    PAIR: Features({"prompt": Value("string"), "answer": Value("string")}),
    TOKENS: Features({"input_ids": Sequence(Value("int64")), "labels": Sequence(Value("int64"))}),
    TEXT: Features({"text": Value("string")}),
}
# A pair as a model reads it that reads images: `answer` is the one that is trained, `answers` are all gold ones.
PAIR_WITH_IMAGE = Features({**FEATURES[PAIR], "answers": Sequence(Value("string")), "image": Value("string")})
IMAGE_KEYS = ("image", "pic_path")


def row_kind(row: Any, where: str, allow_text: bool = False) -> str:
    """TOKENS when the row carries input_ids and labels, else PAIR, else (if allowed) TEXT.

    Args:
        row: one row as its reader gave it.
        where: file and row number, for the message.
        allow_text: whether a row of plain text is of use to the caller (the general-ability text).
    Raises:
        UserError: the row is no object, or has none of the sets of keys.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with prompt and answer, got {_type_name(row)}")
    for kind in (TOKENS, PAIR, TEXT) if allow_text else (TOKENS, PAIR):
        if all(key in row for key in KEYS[kind]):
            return kind
    missing = " or ".join(repr(key) for key in KEYS[PAIR] if key not in row)
    raise UserError(f"{where}: no {missing}, it has {sorted(map(str, row))}; a row needs prompt and answer")


def features_of(kind: str, images: bool) -> Features:
    """The columns of checked rows."""
    return PAIR_WITH_IMAGE if images and kind == PAIR else FEATURES[kind]


def checked_rows(
    rows: Iterable[Any], source: str, allow_text: bool = False, images: bool = False
) -> Iterator[dict[str, Any]]:
    """rows with exactly the keys of their kind, each checked; other columns are dropped.

    Numbers as answers become text as Python writes them (11, 2.5): an answer is what the model is to write.

    Args:
        rows: rows as read; row numbers in messages count from 1.
        source: the file or data set, for messages.
        allow_text: see row_kind.
        images: a pair may name an image, as image or pic_path, and its answer may be a list of gold answers.
    Raises:
        UserError: a row that cannot be used, or one of another kind than the first.
    """
    first_kind = None
    for number, row in enumerate(rows, start=1):
        where = f"{source} row {number}"
        kind = row_kind(row, where, allow_text)
        first_kind = first_kind or kind
        if kind != first_kind:
            raise UserError(
                f"{where}: has {KEYS[kind]}, the rows before have {KEYS[first_kind]}; use one form in a file"
            )
        if kind == TOKENS:
            yield _checked_tokens(row, where)
        elif images and kind == PAIR:
            yield _checked_pair_with_image(row, where)
        else:
            yield _checked_texts(row, KEYS[kind], where)


def has_counted_label(labels: list[int]) -> bool:
    """Whether any label enters the loss: a causal model predicts from the second position on."""
    return any(label != IGNORED_LABEL for label in labels[1:])


def _checked_texts(row: dict[str, Any], keys: tuple[str, ...], where: str) -> dict[str, str]:
    texts = {key: _text(row[key], key, where) for key in keys}
    for key in ("answer", "text"):
        if key in texts and not texts[key].strip():
            raise UserError(f"{where}: {key} is empty, so there is nothing to learn; give it text or remove the row")
    return texts


def _checked_pair_with_image(row: dict[str, Any], where: str) -> dict[str, Any]:
    given = row["answer"]
    if isinstance(given, list) and not given:
        raise UserError(f"{where}: answer is an empty list; give at least one gold answer")
    answers = [
        _checked_texts({**row, "answer": answer}, KEYS[PAIR], where)["answer"]
        for answer in (given if isinstance(given, list) else [given])
    ]
    chosen = chosen_answer(answers)
    image = next((row[key] for key in IMAGE_KEYS if row.get(key) is not None), None)
    if image is not None and not isinstance(image, str):
        raise UserError(f"{where}: image must be the path of one file, got {_type_name(image)}")
    return {"prompt": _text(row["prompt"], "prompt", where), "answer": chosen, "answers": answers, "image": image}


def chosen_answer(answers: list[str]) -> str:
    """The one of several gold answers that is trained: the most frequent, the first of equals."""
    return Counter(answers).most_common(1)[0][0]


def _text(value: Any, key: str, where: str) -> str:
    """value as text: strings, and for answers finite numbers."""
    if key == "answer" and type(value) in (int, float) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be text, got {_type_name(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {key} holds half of a surrogate pair, which is no character; fix the escape"
        ) from None
    return value


def _checked_tokens(row: dict[str, Any], where: str) -> dict[str, list[int]]:
    columns = {key: _integers(row[key], key, where) for key in KEYS[TOKENS]}
    ids, labels = columns["input_ids"], columns["labels"]
    if len(ids) != len(labels):
        raise UserError(f"{where}: input_ids has {len(ids)} entries, labels {len(labels)}; they must be equally long")
    if any(token < 0 for token in ids):
        raise UserError(f"{where}: input_ids holds {min(ids)}; token ids are 0 or more")
    if any(label < 0 and label != IGNORED_LABEL for label in labels):
        raise UserError(f"{where}: labels holds {min(labels)}; a label is a token id or {IGNORED_LABEL} (not counted)")
    if not has_counted_label(labels):
        raise UserError(f"{where}: no label other than {IGNORED_LABEL} after the first position, so no loss")
    return columns


def _integers(value: Any, key: str, where: str) -> list[int]:
    if not isinstance(value, list) or any(type(entry) is not int for entry in value):
        raise UserError(f"{where}: {key} must be a list of whole numbers, got {_type_name(value)}")
    return value


def _type_name(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(entry).__name__ for entry in value})) or 'nothing'}"
    return f"{type(value).__name__} {str(value)[:40]!r}"
