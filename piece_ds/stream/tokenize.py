"""Rows of text to rows of token ids, a whole data set at a time.

All rows are tokenized before training starts, so that a row that cannot be used ends the run before the model is
loaded and not in the middle of a task on one of many ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets

from piece_ds.stream.encode import Encoder
from piece_ds.stream.rows import FEATURES, TOKENS

ENCODED = FEATURES[TOKENS]


def tokenize_rows(rows: datasets.Dataset, encoder: Encoder, source: str) -> datasets.Dataset:
    """rows of any kind as input_ids and labels, in the same order; rows of token ids come back as they are.

    Args:
        rows: what load_rows returned. Plain text becomes one row a window, other rows stay one row each.
        encoder: how texts become token ids.
        source: the file or data set, for messages.
    Returns:
        Dataset of columns input_ids and labels (int64 lists), in memory when rows are, else in datasets' disk cache.
    Raises:
        UserError: a row without an answer token, naming source and row.
    """
    columns = set(rows.column_names)
    if columns >= set(ENCODED):
        return rows

    def encode_pairs(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[list[int]]]:
        pairs = zip(batch["prompt"], batch["answer"], indices, strict=True)
        return _columns([encoder.pair(prompt, answer, f"{source} row {i + 1}") for prompt, answer, i in pairs])

    def encode_texts(batch: dict[str, list[str]], indices: list[int]) -> dict[str, list[list[int]]]:
        return _columns([window for text in batch["text"] for window in encoder.windows(text)])

    with no_progress_bars():
        return rows.map(
            encode_pairs if "prompt" in columns else encode_texts,
            with_indices=True,
            batched=True,
            features=ENCODED,
            remove_columns=rows.column_names,
            keep_in_memory=not rows.cache_files,
            load_from_cache_file=bool(rows.cache_files),
        )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """The datasets library's bars off inside, as they were outside: every rank would draw its own."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in ENCODED}
