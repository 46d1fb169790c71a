"""The data formats that people have: which keys tell a format, and what its rows become.

| name | keys | becomes |
|---|---|---|
| token ids | input_ids, labels | TOKENS, as they are |
| prompt/answer | prompt, answer | PAIR |
| chat messages | messages: role and content (OpenAI); system | CHAT |
| ShareGPT | conversations: from and value; system | CHAT |
| prompt/completion | prompt, completion: texts (TRL) | COMPLETION |
| prompt/completion of messages | prompt, completion: messages (TRL) | CHAT, loss on the completion's turns |
| Alpaca | instruction, output; input, system, history | CHAT of one question and answer, after the history |
| text | text | TEXT, loss on all of it |

The first row of a file decides its format. If a row fits two formats, the upper one in FORMATS wins.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from piece_ds.data.conversations import (
    checked_messages,
    from_alpaca,
    from_messages,
    from_sharegpt,
    system_turn,
)
from piece_ds.data.other_shapes import refuse_columns, refuse_keyed_rows, refuse_splits
from piece_ds.data.rows import (
    CHAT,
    COMPLETION,
    KEYS,
    PAIR,
    TEXT,
    TOKENS,
    checked_pair_with_image,
    checked_texts,
    checked_tokens,
    type_name,
)
from piece_ds.runtime.errors import UserError, nearest

Row = dict[str, Any]

# Keys that say what a row's text is about, in one tool or another. Without them it teaches something else.
_TOOLS = ("tools", "functions", "function_call")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios", "pic_path", "pixel_values")
_TURNS_BEFORE = ("system", "history")
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}", "null")


@dataclass(frozen=True)
class RowFormat:
    """One way to write a row.

    Attributes:
        name: for messages.
        keys: keys that every row of the format has.
        kind: what its rows become; see rows.FEATURES.
        convert: (row, file and row number for messages) -> checked row with the columns of its kind.
        optional: keys that mean something if a row has them.
    """

    name: str
    keys: tuple[str, ...]
    kind: str
    convert: Callable[[Row, str], Row]
    optional: tuple[str, ...] = ()


def _pair(row: Row, where: str) -> Row:
    return checked_texts(row, KEYS[PAIR], where)


def _completion(row: Row, where: str) -> Row:
    return checked_texts(row, ("prompt", "completion"), where)


def _completion_messages(row: Row, where: str) -> Row:
    prompt = checked_messages(row["prompt"], "prompt", where)
    completion = checked_messages(row["completion"], "completion", where)
    return from_messages([*prompt, *completion], where, num_context=len(prompt))


def _messages(row: Row, where: str) -> Row:
    turns = checked_messages(row["messages"], "messages", where)
    return from_messages([*system_turn(row, where), *turns], where)


def _refuse_dropped(row: Row, where: str, form: RowFormat, images: bool) -> None:
    """Raise UserError if a row says more than its text, and that would be dropped.

    Token ids and plain text were put together elsewhere, so only media can be missing from them.

    Args:
        row, where: as in RowFormat.convert.
        form: of the row.
        images: whether the model reads them; only a pair may name one.
    """
    said = {key for key in (*_TOOLS, *_MEDIA, *_TURNS_BEFORE) if row.get(key) not in _EMPTY}
    used = {key for key in form.optional if images or key not in _MEDIA}
    keys = _MEDIA if form.kind in (TOKENS, TEXT) else (*_TOOLS, *_MEDIA, *_TURNS_BEFORE)
    key = next((key for key in keys if key in said - used), None)
    if key is None:
        return
    if key in _TURNS_BEFORE:
        raise UserError(
            f"{where}: {key!r} has no place in a row of {form.name}; write it into the text or the turns, or remove "
            "the key"
        )
    if key in _TOOLS:
        reason = "tools and calls of them are not supported"
    elif form.kind == CHAT:
        reason = "images, sounds and films beside turns are not supported"
    elif form.kind == PAIR and images:
        reason = "beside prompt and answer a row may name one image, as the key 'image'"
    else:
        reason = "images, sounds and films would not be read with it, since the model or the form of the row has none"
    raise UserError(f"{where}: {reason}; remove the key {key!r} or the row")


def _text(row: Row, where: str) -> Row:
    return checked_texts(row, KEYS[TEXT], where)


FORMATS = (
    RowFormat("token ids", KEYS[TOKENS], TOKENS, checked_tokens),
    RowFormat("prompt/answer", KEYS[PAIR], PAIR, _pair, ("image", "pic_path")),
    RowFormat("chat messages", ("messages",), CHAT, _messages, ("system",)),
    RowFormat("ShareGPT", ("conversations",), CHAT, from_sharegpt, ("system",)),
    RowFormat("prompt/completion of messages", ("prompt", "completion"), CHAT, _completion_messages),
    RowFormat("prompt/completion", ("prompt", "completion"), COMPLETION, _completion),
    RowFormat("Alpaca", ("instruction", "output"), CHAT, from_alpaca, ("input", "system", "history")),
    RowFormat("text", KEYS[TEXT], TEXT, _text),
)
KNOWN_COLUMNS = tuple(dict.fromkeys(key for form in FORMATS for key in (*form.keys, *form.optional)))


def format_of(row: Any, where: str) -> RowFormat:
    """Return the format of a row, judged by its keys.

    Args:
        row: as read.
        where: file and row, for the message.
    Raises:
        UserError: the row is no object, or of no known format; the message names the nearest format.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with prompt and answer, got {type_name(row)}")
    refuse_columns(row, where)
    for form in FORMATS:
        # The same keys hold texts or messages: the value's type tells.
        is_of_messages = form.convert is not _completion_messages or isinstance(row.get("completion"), list)
        if all(key in row for key in form.keys) and is_of_messages:
            return form

    # No format fits, for a reason of its own.
    _refuse_other_shapes(row, where)

    # Name the nearest format, and guess which column is meant by which key.
    names = sorted(map(str, row))
    form = max(FORMATS[1:], key=lambda form: _likeness(form, names))
    if _likeness(form, names) < _LEAST_LIKENESS:
        form = FORMATS[1]
    missing = [key for key in form.keys if key not in row]
    free = [str(name) for name in row if name not in form.keys]
    mapping = ",".join(f"{key}={name}" for key, name in _paired(missing, free))
    raise UserError(
        f"{where}: no {' or '.join(map(repr, missing))}, it has {str(names)[:200]}; the nearest known format is "
        f"{form.name} ({', '.join(form.keys)}): rename the columns, or say which is which (--columns {mapping})"
    )


def _refuse_other_shapes(row: dict[str, Any], where: str) -> None:
    """Raise UserError for a row that no renaming of columns would mend."""
    if "chosen" in row and "rejected" in row:
        raise UserError(
            f"{where}: pairs of preferences (chosen, rejected) are not trained by the commands: use TRL's DPOTrainer "
            "with PieceCallback (docs/running.md), or learn only the chosen ones (--columns answer=chosen)"
        )
    refuse_splits(row, where)
    if all(not isinstance(value, str) for value in row.values()) or _holds_known_rows(row):
        refuse_keyed_rows(row, where)


def _holds_known_rows(row: dict[str, Any]) -> bool:
    """Return whether a list in an object begins with a row of a known format."""
    firsts = [value[0] for value in row.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return any(all(key in first for key in form.keys) for first in firsts for form in FORMATS)


def _paired(missing: list[str], free: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each missing key with the most similar free name, else with the first one, else with NAME."""
    for key in missing:
        name = (get_close_matches(key, free, n=1) or free or ["NAME"])[0]
        free = [other for other in free if other != name]
        yield key, name


_LEAST_LIKENESS = 0.4


def _likeness(form: RowFormat, names: list[str]) -> float:
    """Return how well the keys of form match names: the mean over keys of the best match, 0 to 1."""
    best = [max((SequenceMatcher(None, key, name).ratio() for name in names), default=0.0) for key in form.keys]
    return sum(score if score > 0.6 else 0.0 for score in best) / len(best)


def parse_columns(text: str | None) -> dict[str, str]:
    """Return name in the file -> known name, parsed from --columns such as prompt=question,answer=target.

    Raises:
        UserError: a part is not KNOWN=NAME, names an unknown key, or gives a name twice.
    """
    renamed: dict[str, str] = {}
    for part in (text or "").split(",") if text else ():
        known, equals, name = (piece.strip() for piece in part.partition("="))
        if not (known and equals and name):
            raise UserError(
                f"--columns expects KNOWN=NAME,KNOWN=NAME, got {part!r}; as in prompt=question,answer=target"
            )
        if known not in KNOWN_COLUMNS:
            raise UserError(
                f"--columns {part.strip()}: {known!r} is no column of a known format; known: "
                f"{', '.join(KNOWN_COLUMNS)}.{nearest(known, list(KNOWN_COLUMNS))}"
            )
        if name in renamed or known in renamed.values():
            raise UserError(f"--columns names {name if name in renamed else known!r} twice; name each once")
        renamed[name] = known
    return renamed


def renamed_row(row: Any, columns: dict[str, str], where: str) -> Any:
    """Return row under the names of --columns. Raise UserError if a named column is missing."""
    if not columns or not isinstance(row, dict):
        return row
    missing = [name for name in columns if name not in row]
    if missing:
        names = sorted(map(str, row))
        raise UserError(
            f"{where}: --columns names {missing[0]!r}, it has {str(names)[:200]}.{nearest(missing[0], names)}"
        )
    # A renamed column hides one that already has the known name.
    kept = {name: value for name, value in row.items() if name not in columns and name not in columns.values()}
    return {**kept, **{known: row[name] for name, known in columns.items()}}


def checked_rows(
    rows: Iterable[Any], source: str, images: bool = False, columns: dict[str, str] | None = None
) -> Iterator[Row]:
    """Yield rows with exactly the columns of their kind, each checked. Other columns are dropped.

    Args:
        rows: rows as read; row numbers in messages count from 1.
        source: file or data set, for messages.
        images: a pair may name an image, as image or pic_path, and its answer may be a list of gold answers.
        columns: from parse_columns().
    Raises:
        UserError: a row cannot be used, or has another format than the first row.
    """
    first = None
    for number, raw in enumerate(rows, start=1):
        where = f"{source} row {number}"
        row = renamed_row(raw, columns or {}, where)
        form = format_of(row, where)
        # One file, one format: a mixed file is more likely a mistake.
        first = first or form
        if form is not first:
            raise UserError(
                f"{where}: has {form.keys} ({form.name}), the rows before have {first.keys} ({first.name}); use one "
                "form in a file"
            )
        _refuse_dropped(row, where, form, images)
        yield checked_pair_with_image(row, where) if images and form.kind == PAIR else form.convert(row, where)
