"""Turn rows of text into rows of token ids, a whole data set at a time.

All rows are tokenized before training starts. So an unusable row ends the run before the model is loaded, not in the
middle of a task on one of many ranks.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from piece_ds.data.chat import ChatTemplate
from piece_ds.data.conversations import Messages
from piece_ds.data.rows import FEATURES, IGNORED_LABEL, TOKENS, has_counted_label
from piece_ds.runtime.errors import UserError


@dataclass(frozen=True)
class Encoder:
    """Turns texts into token ids.

    Attributes:
        tokenizer: of transformers. Without a BOS token, EOS takes its place, as in the authors' code.
        cutoff: most tokens that a prompt keeps, and most that an answer keeps, counted from the end; >= 1.
        chat_template: wrap the prompt of a pair as a user's turn in the tokenizer's chat template. The template brings
            its own first token, so no BOS is added. The answer still ends with EOS.
        conversations: conversations go through the tokenizer's chat template, if it has one.
    Raises:
        UserError: the tokenizer has no EOS, or no chat template although one is asked for.
    """

    tokenizer: PreTrainedTokenizerBase
    cutoff: int
    chat_template: bool = False
    conversations: bool = True

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no eos_token, so an answer would never end; set one in its files")
        if self.chat_template and not self.tokenizer.chat_template:
            raise UserError("--chat_template: the tokenizer has no chat template; drop the flag or give it one")

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids before the answer, in training and generation alike; at least one."""
        if self.chat_template:
            return self._ids(self._in_template(prompt))[-self.cutoff :]
        # The end of a prompt matters most: it is what the answer follows.
        ids = self._ids(prompt)[-self.cutoff :]
        # Text that was made with a template begins with BOS already.
        return [self._bos_id(), *ids] if len(ids) < self.cutoff and ids[:1] != [self._bos_id()] else ids

    def _in_template(self, prompt: str) -> str:
        """Return a prompt as a user's turn. Raise UserError if the template leaves it out or draws what it writes."""
        turn, where = [{"role": "user", "content": prompt}], f"prompt {prompt[:40]!r}"
        template = ChatTemplate(self.tokenizer)
        text = template.text(turn, where, generation_prompt=True)
        if "".join(prompt.split()) not in "".join(text.split()):  # templates may trim, and fold blanks
            raise UserError(f"{where}: the tokenizer's chat template does not write it; use --chat_template false")
        if text != template.text(turn, where, generation_prompt=True):
            raise UserError(f"{where}: the tokenizer's chat template writes something else each time; mend it")
        return text

    def answer_ids(self, answer: str) -> list[int]:
        """Return the token ids of the answer, with EOS if there is room; none if the answer has no token of its own."""
        ids = self._ids(answer)[-self.cutoff :]
        eos = self.tokenizer.eos_token_id
        return [*ids, eos] if 0 < len(ids) < self.cutoff and ids[-1] != eos else ids

    def pair(self, prompt: str, answer: str, where: str) -> dict[str, list[int]]:
        """Return input_ids and labels of one pair. Labels are IGNORED_LABEL on the prompt.

        Raises:
            UserError: the tokenizer makes nothing of the answer; the message names where (file and row).
        """
        prompt_ids, answer_ids = self.prompt_ids(prompt), self.answer_ids(answer)
        if not answer_ids:
            raise UserError(f"{where}: no answer token is left after tokenization of {answer[:40]!r}; remove the row")
        return {
            "input_ids": prompt_ids + answer_ids,
            "labels": [IGNORED_LABEL] * len(prompt_ids) + answer_ids,
        }

    @property
    def templates_conversations(self) -> bool:
        """Whether conversations go through a chat template."""
        return self.conversations and bool(self.tokenizer.chat_template)

    def conversation(self, messages: Messages, num_context: int, where: str) -> dict[str, list[int]]:
        """Return input_ids and labels of one conversation. Labels count on the assistant's turns.

        Without a chat template, one question with its answer is encoded as a pair. Tokens past the cutoff are dropped.

        Args:
            messages: turns of role and content.
            num_context: turns at the beginning that give no loss.
            where: file and row, for messages.
        Raises:
            UserError: see ChatTemplate.encode(); also no counted label before the cutoff, or several turns without a
                template.
        """
        if self.templates_conversations:
            row = ChatTemplate(self.tokenizer).encode(messages, where, num_context)
            return self._kept(row, where)
        if [message["role"] for message in messages] != ["user", "assistant"]:
            reason = "--chat_template false" if self.conversations is False else "the tokenizer has no chat template"
            raise UserError(
                f"{where}: {len(messages)} turns need a chat template, and {reason}; only one question with one answer "
                "does without"
            )
        return self.pair(messages[0]["content"], messages[1]["content"], where)

    def completion(self, prompt: str, completion: str, where: str) -> dict[str, list[int]]:
        """Return input_ids and labels of a prompt and its completion, with EOS at the end. Labels count on the latter.

        Both texts are tokenized as one, with what the tokenizer itself puts around a text, as TRL does.
        """
        if self.chat_template:
            return self.pair(prompt, completion, where)
        eos = self.tokenizer.eos_token
        ids = self._ids(prompt + completion.removesuffix(eos) + eos, special=True)
        before = self._ids(prompt, special=True)
        # A token that spans the border belongs to the completion.
        start = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        return self._kept({"input_ids": ids, "labels": [IGNORED_LABEL] * start + ids[start:]}, where)

    def documents(self, text: str) -> list[dict[str, list[int]]]:
        """Return plain text with EOS at the end, as the tokenizer encodes it, in pieces of at most cutoff tokens."""
        eos = self.tokenizer.eos_token
        ids = self._ids(text.removesuffix(eos) + eos, special=True)
        pieces = [ids[start : start + self.cutoff] for start in range(0, len(ids), self.cutoff)]
        return [{"input_ids": piece, "labels": piece} for piece in pieces if len(piece) > 1]

    def _kept(self, row: dict[str, list[int]], where: str) -> dict[str, list[int]]:
        cut = {name: ids[: self.cutoff] for name, ids in row.items()}
        if not has_counted_label(cut["labels"]):
            raise UserError(
                f"{where}: no token to learn among the first {self.cutoff} of {len(row['input_ids'])}; raise "
                "--max_prompt_len or remove the row"
            )
        return cut

    def windows(self, text: str) -> list[dict[str, list[int]]]:
        """Return plain text in pieces of at most cutoff tokens, each after a BOS. Every token of the text has loss."""
        bos, ids = self._bos_id(), self._ids(text)
        ids = ids[1:] if ids[:1] == [bos] else ids  # every piece gets one
        pieces = [ids[start : start + self.cutoff] for start in range(0, len(ids), self.cutoff)]
        return [
            {"input_ids": [bos, *piece], "labels": [IGNORED_LABEL, *piece]}  # the first position has no loss
            for piece in pieces
        ]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        encoding: dict[str, Any] = self.tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)
        ids: list[int] = encoding["input_ids"]
        # The tokenizer puts a BOS before one that the text has already.
        is_doubled = special and ids[:2] == [self.tokenizer.bos_token_id] * 2
        return ids[1:] if is_doubled else ids

    def _bos_id(self) -> int:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return eos if bos is None else bos


def split_prompt(input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Return (prompt ids, answer ids) of an encoded row. The answer is the last run of counted labels.

    In a conversation that is the assistant's last turn. Rows that came as token ids are split by the same rule, so they
    can be generated from too. The first position is always prompt: a model needs something to continue.
    """
    stop = next(index for index in range(len(labels), 1, -1) if labels[index - 1] != IGNORED_LABEL)
    start = next((index for index in range(stop, 1, -1) if labels[index - 1] == IGNORED_LABEL), 1)
    return input_ids[:start], labels[start:stop]


ENCODED = FEATURES[TOKENS]


RowEncoder = Callable[[dict[str, Any], str], list[dict[str, list[int]]]]


def tokenize_rows(rows: datasets.Dataset, encoder: Encoder, source: str, documents: bool = False) -> datasets.Dataset:
    """Return rows of any kind as input_ids and labels, in the same order. Rows of token ids come back as they are.

    Args:
        rows: from load_rows(). Plain text may become several rows; every other row stays one row.
        encoder: turns texts into token ids.
        source: file or data set, for messages.
        documents: plain text is to be learned (Encoder.documents()) rather than evaluated on (Encoder.windows()).
    Returns:
        Dataset of columns input_ids and labels (int32 lists), in memory.
    Raises:
        UserError: a row without an answer token; the message names source and row.
    """
    columns = rows.column_names
    if set(columns) >= set(ENCODED):
        return rows
    encode = row_encoder(columns, encoder, documents)

    def encode_batch(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        given = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        pairs = zip(given, indices, strict=True)
        return _columns([encoded for row, i in pairs for encoded in encode(row, f"{source} row {i + 1}")])

    with no_progress_bars():
        return rows.map(
            encode_batch,
            with_indices=True,
            batched=True,
            features=ENCODED,
            remove_columns=columns,
            keep_in_memory=True,
            load_from_cache_file=False,
        )


def row_encoder(columns: Collection[str], encoder: Encoder, documents: bool) -> RowEncoder:
    """Return (checked row, file and row for messages) -> encoded rows.

    Args:
        columns: of the rows, which tell their kind.
        encoder, documents: as in tokenize_rows().
    """

    def encode(row: dict[str, Any], where: str) -> list[dict[str, list[int]]]:
        if "input_ids" in columns:
            return [{name: row[name] for name in ENCODED}]
        if "messages" in columns:
            return [encoder.conversation(row["messages"], row["num_context"], where)]
        if "completion" in columns:
            return [encoder.completion(row["prompt"], row["completion"], where)]
        if "prompt" in columns:
            return [encoder.pair(row["prompt"], row["answer"], where)]
        return encoder.documents(row["text"]) if documents else encoder.windows(row["text"])

    return encode


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the datasets library's bars off inside: every rank would draw its own."""
    were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            datasets.enable_progress_bars()


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in rows] for key in ENCODED}
