"""General text that nobody has to supply: rows that stand for what a model could do before the first task.

There are three kinds: `self`, which the base model writes (evaluation.self_written); `builtin`, the English prose that
every Python installation carries; and any file. Rows of every kind are encoded like those of a task (input_ids and
labels). So statistics, replay and a KL term use them like any other rows.
"""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import datasets

from piece_ds.data.rows import FEATURES, IGNORED_LABEL, TOKENS
from piece_ds.data.tokenize import Encoder
from piece_ds.runtime.errors import MachineError, UserError

SELF, BUILTIN = "self", "builtin"

# The search for a scale and its report each need a row, and so does training.
JUDGED_EVERY, NUM_JUDGED, MIN_ROWS_TO_SPLIT = 4, 2, 3
# A docstring shorter than this is a label, not prose.
MIN_CHARACTERS = 200
# Third-party code, tests and generated tables: not the library's own prose, or not in every installation.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data"}


def rows_of_tokens(token_ids: Sequence[Sequence[int]]) -> datasets.Dataset:
    """Return rows with loss on every token but the first, which nothing predicts.

    Args:
        token_ids: of each row, with its first token (BOS or a prompt's); at least two tokens a row.
    Returns:
        Dataset of columns input_ids and labels.
    """
    ids = [list(row) for row in token_ids]
    labels = [[IGNORED_LABEL, *row[1:]] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}, features=FEATURES[TOKENS])


def hold_out_judged(rows: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Return (rows to use, rows to judge on): every fourth is judged on, at least two are.

    Raises:
        UserError: there are fewer than three rows.
    """
    if len(rows) < MIN_ROWS_TO_SPLIT:
        raise UserError(
            f"--general_text has {len(rows)} rows: --forgetting_budget without --general_file needs three or more, of "
            "which it holds out two"
        )
    judged = list(range(JUDGED_EVERY - 1, len(rows), JUDGED_EVERY))
    if len(judged) < NUM_JUDGED:
        judged = list(range(len(rows) - NUM_JUDGED, len(rows)))
    used = sorted(set(range(len(rows))) - set(judged))
    return rows.select(used), rows.select(judged)


def builtin_rows(encoder: Encoder, num_rows: int, num_tokens: int, seed: int) -> datasets.Dataset:
    """Return pieces of Python's documentation and of the standard library's docstrings, drawn by seed.

    Args:
        encoder: its tokenizer makes the tokens; BOS comes first in each piece.
        num_rows: rows wanted; each is a piece of another text.
        num_tokens: of every row, BOS included. Shorter texts are left out.
        seed: of the draw. The rows are the same for the same seed, tokenizer and Python installation.
    Raises:
        MachineError: this installation carries too little prose.
    Cost: a few seconds; about a tenth of the library's sources are read.
    """
    random = Random(f"{seed}/general text")
    rows: list[list[int]] = []
    for text in _prose(random):
        # One piece per text, from its start, so that rows are independent of each other.
        window = encoder.windows(text)[0]["input_ids"][:num_tokens] if text.strip() else []
        if len(window) == num_tokens:
            rows.append(window)
        if len(rows) == num_rows:
            return rows_of_tokens(rows)
    raise MachineError(
        f"this Python installation carries {len(rows)} texts of at least {num_tokens} tokens, {num_rows} are wanted: "
        "install the full standard library, or give --general_text a file"
    )


def _prose(random: Random) -> Iterator[str]:
    """Yield topics of Python's help() and docstrings in random order, until none is left."""
    topics = _topics()
    files = _source_files()
    random.shuffle(topics)
    random.shuffle(files)
    while topics or files:
        # Alternate: there are fewer topics, and topics are all about syntax.
        if topics:
            yield topics.pop()
        if files:
            yield from _docstrings(files.pop())


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions ship it apart
        return []
    return [str(text) for _, text in sorted(topics.items())]


def _source_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    return sorted(path for path in root.rglob("*.py") if not _SKIPPED & set(path.relative_to(root).parts))


def _docstrings(path: Path) -> list[str]:
    """Return the docstrings of a module, its classes and its functions that are long enough to be prose."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):  # the library also keeps sources that are not meant to compile
        return []
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return [text for node in nodes if len(text := ast.get_docstring(node) or "") >= MIN_CHARACTERS]
