"""Collate encoded rows of different lengths into one batch of tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.runtime.errors import UserError


@dataclass(frozen=True)
class MicroBatches:
    """Micro-batches of a dataset as a sequence.

    Item b is rows [b B, (b + 1) B), collated; the last item may be smaller. A micro-batch is collated when it is asked
    for and is not kept.

    Attributes:
        rows: a dataset with length and integer access.
        collate: rows -> model inputs with labels.
        batch_size: B, in rows.
        loss_of: (engine, micro-batch) -> mean loss; a trainer's own, in place of engine(**micro_batch).loss.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], Any]
    batch_size: int
    loss_of: Callable[[Any, Any], Tensor] | None = None

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __getitem__(self, b: int) -> Any:
        begin = b * self.batch_size
        return self.collate([self.rows[i] for i in range(begin, begin + self.num_rows(b))])

    def num_rows(self, b: int) -> int:
        """Return how many rows micro-batch b has."""
        if not 0 <= b < len(self):
            raise IndexError(b)
        return min(self.batch_size, len(self.rows) - b * self.batch_size)

    def first(self, num_rows: int) -> "MicroBatches":
        """Return the micro-batches of the first num_rows rows only."""
        if num_rows >= len(self.rows):
            return self
        rows: Any = self.rows
        return replace(self, rows=rows.select(range(num_rows)) if hasattr(rows, "select") else rows[:num_rows])

    def __iter__(self) -> Iterator[Any]:
        return (self[b] for b in range(len(self)))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token id to pad with: the pad token, or else EOS. Raise UserError if the tokenizer has neither."""
    chosen = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if chosen is None:
        raise UserError("the tokenizer has neither a pad_token nor an eos_token to pad with; set one in its files")
    return chosen


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest one, rounded up to a multiple; a callable for DataLoader and Trainer.

    Training pads on the right. A causal model never sees later tokens, so a row keeps the loss that it has without
    padding, whatever the model does with positions, recurrences, convolutions or the attention mask. With padding on
    the left, one in five of transformers' causal classes gives another loss. Padding on the left is for generation.

    A row's first token is never a label: no token comes before it. So the loss does not depend on the padding.

    Attributes:
        pad_id: token id of padding. It is masked from attention and from the loss.
        multiple: padded lengths are multiples of it; 8 suits tensor cores and is what the method's authors use. A
            single row is not padded, so one row at a time is right whatever a model makes of padding.
        side: of the padding, 'right' or 'left'.
    """

    pad_id: int
    multiple: int = 8
    side: str = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows into one batch.

        Args:
            rows: at least one mapping with input_ids and labels of equal length; other keys are ignored.
        Returns:
            input_ids, labels and attention_mask, int64, (len(rows), padded length), on the CPU.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        # A single row needs no padding, so no model can be disturbed by it.
        multiple = self.multiple if len(rows) > 1 else 1
        shape = (len(rows), -(-longest // multiple) * multiple)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED_LABEL, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        for index, row in enumerate(rows):
            where = self.place(len(row["input_ids"]), shape[1])
            input_ids[index, where] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
            labels[index, where] = torch.as_tensor(row["labels"], dtype=torch.int64)
            labels[index, where.start] = IGNORED_LABEL  # else padding would predict it, but only in padded rows
            attention_mask[index, where] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def place(self, length: int, padded: int) -> slice:
        """Return where a row of length tokens lies in a row of padded tokens."""
        return slice(0, length) if self.side == "right" else slice(padded - length, padded)
