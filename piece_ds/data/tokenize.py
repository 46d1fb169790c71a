"""Rows of text to rows of token ids, a whole data set at a time.

All rows are tokenized before training starts, so that a row that cannot be used ends the run before the model is
loaded and not in the middle of a task on one of many ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from piece_ds.data.rows import FEATURES, IGNORED_LABEL, TOKENS
from piece_ds.runtime.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """Turns texts into token ids.

    Attributes:
        tokenizer: of transformers; without a BOS token its EOS token stands in, as in the authors' code.
        cutoff: most tokens a prompt, and separately an answer, keeps, from its end; >= 1.
        chat_template: wrap the prompt as a user's turn in the tokenizer's chat template. The template then brings its
            own first token, so no BOS is added; the answer still ends with EOS.
    """

    tokenizer: PreTrainedTokenizerBase
    cutoff: int
    chat_template: bool = False

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, so an answer would never end; set one in its files")
        if self.chat_template and not self.tokenizer.chat_template:
            raise UserError("--chat_template: the tokenizer has no chat template; drop the flag or give it one")

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids the answer follows, in training and in generation alike; at least one."""
        if self.chat_template:
            turn = [{"role": "user", "content": prompt}]
            prompt = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
            return self._ids(prompt)[-self.cutoff :]
        ids = self._ids(prompt)[-self.cutoff :]
        return [self._bos_id(), *ids] if len(ids) < self.cutoff else ids

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of the answer with EOS where there is room; empty when the answer has no token of its own."""
        ids = self._ids(answer)[-self.cutoff :]
        return [*ids, self.tokenizer.eos_token_id] if 0 < len(ids) < self.cutoff else ids

    def pair(self, prompt: str, answer: str, where: str) -> dict[str, list[int]]:
        """input_ids and labels of one row; labels are IGNORED_LABEL on the prompt.

        Raises:
            UserError: the tokenizer makes nothing of the answer; where (file and row) is named.
        """
        prompt_ids, answer_ids = self.prompt_ids(prompt), self.answer_ids(answer)
        if not answer_ids:
            raise UserError(f"{where}: no answer token is left after tokenization of {answer[:40]!r}; remove the row")
        return {
            "input_ids": prompt_ids + answer_ids,
            "labels": [IGNORED_LABEL] * len(prompt_ids) + answer_ids,
        }

    def windows(self, text: str) -> list[dict[str, list[int]]]:
        """Plain text cut into pieces of at most cutoff tokens after a BOS; the loss sees every token of the text."""
        ids = self._ids(text)
        pieces = [ids[start : start + self.cutoff] for start in range(0, len(ids), self.cutoff)]
        return [
            {"input_ids": [self._bos_id(), *piece], "labels": [IGNORED_LABEL, *piece]}  # the first position has no loss
            for piece in pieces
        ]

    def _ids(self, text: str) -> list[int]:
        encoding: dict[str, Any] = self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)
        return encoding["input_ids"]

    def _bos_id(self) -> int:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return eos if bos is None else bos


def split_prompt(input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids) of an encoded row: the answer starts at the first counted label.

    Rows that came as token ids are split by the same rule, so they too can be generated from; the first position
    is always prompt, since a model needs something to continue.
    """
    start = next(index for index, label in enumerate(labels) if label != IGNORED_LABEL and index > 0)
    return input_ids[:start], [label for label in labels[start:] if label != IGNORED_LABEL]


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
