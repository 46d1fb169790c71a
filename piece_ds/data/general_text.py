"""General text that nobody has to bring: rows that stand for what a model could do before the first task.

Three kinds serve: `self`, what the base model writes (evaluation.self_written makes it), `builtin`, the English prose
that every Python installation carries, and any file. Whatever the kind, rows are encoded as those of a task are
(input_ids and labels), so that statistics, replay and a KL term take them like any other rows.
"""

import ast
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import datasets

from piece_ds.data.rows import FEATURES, IGNORED_LABEL, TOKENS
from piece_ds.data.tokenize import Encoder
from piece_ds.runtime.errors import MachineError

SELF, BUILTIN = "self", "builtin"

# A docstring shorter than this is a label, not prose.
MIN_CHARACTERS = 200
# Third-party code, tests and generated tables: not the installation's own prose, or not there everywhere.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data"}


def rows_of_tokens(token_ids: Sequence[Sequence[int]]) -> datasets.Dataset:
    """Rows whose loss is that of every token but the first, which nothing predicts.

    Args:
        token_ids: of each row, its first token (BOS or a prompt's) included; at least two.
    Returns:
        Dataset of columns input_ids and labels.
    """
    ids = [list(row) for row in token_ids]
    labels = [[IGNORED_LABEL, *row[1:]] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}, features=FEATURES[TOKENS])


def builtin_rows(encoder: Encoder, num_rows: int, num_tokens: int, seed: int) -> datasets.Dataset:
    """Pieces of the language's documentation and of the standard library's docstrings, drawn by seed.

    Args:
        encoder: its tokenizer makes the tokens, and BOS stands before each piece.
        num_rows: rows wanted; each is a piece of another text.
        num_tokens: of every row, BOS included; shorter texts are left out.
        seed: of the draw: the same rows for the same seed, tokenizer and Python installation.
    Raises:
        MachineError: this installation carries too little prose.
    Cost: a few seconds, reading about a tenth of the library's sources.
    """
    random = Random(f"{seed}/general text")
    rows: list[list[int]] = []
    for text in _prose(random):
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
    """Topics of Python's help() and docstrings, shuffled together, as long as there are any."""
    topics = _topics()
    files = _source_files()
    random.shuffle(topics)
    random.shuffle(files)
    while topics or files:
        # In turn: the topics are fewer, and prose about syntax alone would be one kind of text.
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
    """The docstring of the module, of its classes and of its functions, where it is long enough to be prose."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    except (SyntaxError, ValueError):  # the library also keeps sources that are not meant to compile
        return []
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return [text for node in nodes if len(text := ast.get_docstring(node) or "") >= MIN_CHARACTERS]
