"""What one row may be once its format is known: a pair, a completion, a conversation, token ids, or text.

Every rule about the types and emptiness of a row's parts stands here, so that all formats fail with the same words.
formats.py says which keys the files of which tool have.
"""

import math
from collections import Counter
from typing import Any

from datasets import Features, Sequence, Value

from piece_ds.runtime.errors import UserError

IGNORED_LABEL = -100  # torch's and transformers' ignore_index

PAIR = "pair"
COMPLETION = "completion"
CHAT = "chat"
TOKENS = "tokens"
TEXT = "text"
KEYS = {PAIR: ("prompt", "answer"), TOKENS: ("input_ids", "labels"), TEXT: ("text",)}
FEATURES = {
    PAIR: Features({"prompt": Value("string"), "answer": Value("string")}),
    COMPLETION: Features({"prompt": Value("string"), "completion": Value("string")}),
    # The first `num_context` turns give no loss: the row's first answer replies to them.
    CHAT: Features(
        {"messages": [{"role": Value("string"), "content": Value("string")}], "num_context": Value("int64")}
    ),
    TOKENS: Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int32"))}),
    TEXT: Features({"text": Value("string")}),
}
# A pair for a model that reads images: `answer` is the one that is trained, `answers` are all gold answers.
PAIR_WITH_IMAGE = Features({**FEATURES[PAIR], "answers": Sequence(Value("string")), "image": Value("string")})
IMAGE_KEYS = ("image", "pic_path")

MAX_TOKEN_ID = 2**31 - 1  # no vocabulary is larger, so rows hold 32 bits a token; batches hold 64, as torch wants


def features_of(kind: str, images: bool) -> Features:
    """Return the columns of checked rows of a kind; images matters only for pairs."""
    return PAIR_WITH_IMAGE if images and kind == PAIR else FEATURES[kind]


def has_counted_label(labels: list[int]) -> bool:
    """Return whether any label enters the loss. A causal model predicts from the second position on."""
    return any(label != IGNORED_LABEL for label in labels[1:])


def checked_texts(row: dict[str, Any], keys: tuple[str, ...], where: str) -> dict[str, str]:
    """Return the texts of keys. Raise UserError if one is no text, or if the text to learn is empty."""
    texts = {key: text_of(row[key], key, where) for key in keys}
    for key in ("answer", "completion", "text"):
        if key in texts and not texts[key].strip():
            raise UserError(f"{where}: {key} is empty, so there is nothing to learn; give it text or remove the row")
    return texts


def checked_pair_with_image(row: dict[str, Any], where: str) -> dict[str, Any]:
    """Return prompt, answer, all gold answers and the image's path (or None) of a pair.

    Raises:
        UserError: no gold answer, an empty one, or an image that is not one path.
    """
    given = row["answer"]
    if isinstance(given, list) and not given:
        raise UserError(f"{where}: answer is an empty list; give at least one gold answer")
    answers = [
        checked_texts({**row, "answer": answer}, KEYS[PAIR], where)["answer"]
        for answer in (given if isinstance(given, list) else [given])
    ]
    chosen = chosen_answer(answers)
    named = {key: row[key] for key in IMAGE_KEYS if row.get(key) not in (None, "")}
    image = next(iter(named.values()), None)
    if image is not None and not isinstance(image, str):
        raise UserError(f"{where}: image must be the path of one file, got {type_name(image)}")
    if len(set(named.values())) > 1:
        raise UserError(f"{where}: {' and '.join(named)} name different files; a row has one image")
    return {"prompt": text_of(row["prompt"], "prompt", where), "answer": chosen, "answers": answers, "image": image}


def chosen_answer(answers: list[str]) -> str:
    """Return the gold answer that is trained: the most frequent one, or the first of equals."""
    return Counter(answers).most_common(1)[0][0]


def text_of(value: Any, key: str, where: str) -> str:
    """Return value as text. Raise UserError if it is none.

    Answers may also be finite numbers: they become text as Python writes them (11, 2.5).
    """
    # bool is an int to isinstance(), but no answer.
    if key == "answer" and type(value) in (int, float) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key} must be text, got {type_name(value)}")
    try:
        # Such text cannot be written as UTF-8 later.
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {key} holds half of a surrogate pair, which is no character; fix the escape"
        ) from None
    return value


def checked_tokens(row: dict[str, Any], where: str) -> dict[str, list[int]]:
    """Return input_ids and labels. Raise UserError if they are no token ids or give no loss."""
    columns = {key: _integers(row[key], key, where) for key in KEYS[TOKENS]}
    ids, labels = columns["input_ids"], columns["labels"]
    if len(ids) != len(labels):
        raise UserError(f"{where}: input_ids has {len(ids)} entries, labels {len(labels)}; they must be equally long")
    if any(token < 0 for token in ids):
        raise UserError(f"{where}: input_ids holds {min(ids)}; token ids are 0 or more")
    if any(label < 0 and label != IGNORED_LABEL for label in labels):
        raise UserError(f"{where}: labels holds {min(labels)}; a label is a token id or {IGNORED_LABEL} (not counted)")
    attended = row.get("attention_mask")
    if attended is not None and (not isinstance(attended, list) or len(attended) != len(ids) or set(attended) - {1}):
        raise UserError(
            f"{where}: attention_mask must be 1 for each of the {len(ids)} input_ids: rows are taken whole, and "
            "batches are padded here; remove padding, or the key"
        )
    if not has_counted_label(labels):
        raise UserError(f"{where}: no label other than {IGNORED_LABEL} after the first position, so no loss")
    return columns


def _integers(value: Any, key: str, where: str) -> list[int]:
    if not isinstance(value, list) or any(type(entry) is not int for entry in value):
        raise UserError(f"{where}: {key} must be a list of whole numbers, got {type_name(value)}")
    if any(entry > MAX_TOKEN_ID for entry in value):
        raise UserError(f"{where}: {key} holds a number past 2^31, which is no token id; fix the row")
    return value


def type_name(value: Any) -> str:
    """Return in a few words what value is, for a message."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, list):
        return f"a list of {', '.join(sorted({type(entry).__name__ for entry in value})) or 'nothing'}"
    return f"{type(value).__name__} {str(value)[:40]!r}"
