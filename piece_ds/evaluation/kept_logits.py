"""Keep a model's logits of some rows in a file, to the bit, so that a later model can be held to them.

One forward pass over the rows before training replaces a second model beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from piece_ds.data.collate import MicroBatches
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.evaluation.batches import evaluating
from piece_ds.runtime.distributed import barrier, is_main, rank, world_size
from piece_ds.runtime.progress import progress_bar

# numpy has no bf16: its bits are kept.
_BITS = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "int16"}


class KeptLogits:
    """Logits of every answer token of some rows, in a file that all ranks map.

    Attributes:
        path: of the file.
        offsets: row -> its first answer token in the file; one more for the end.
        vocabulary: width of the logits.
        dtype: of the logits.
    """

    def __init__(
        self, path: Path, num_answer_tokens: Sequence[int], vocabulary: int, dtype: torch.dtype, is_new: bool = True
    ) -> None:
        """Make the file, or open one that finish() has closed. A collective.

        Args:
            path: of the file; all nodes must see it.
            num_answer_tokens: of each row.
            vocabulary: width of the logits.
            dtype: of the logits: fp32, bf16 or fp16.
            is_new: make it.
        """
        self.path, self.vocabulary, self.dtype = path, vocabulary, dtype
        self.offsets = np.concatenate([[0], np.cumsum(num_answer_tokens)])
        self._shape = (int(self.offsets[-1]), vocabulary)

        # One rank makes the file; all of them write to it.
        if is_new and is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.memmap(path, _BITS[dtype], "w+", shape=self._shape).flush()
        barrier()
        self._values = np.memmap(path, _BITS[dtype], "r+" if is_new else "r", shape=self._shape)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._shape[0] * self._shape[1] * self.dtype.itemsize

    def write(self, first_row: int, logits_AV: Tensor) -> None:
        """Write the logits of all answer tokens of consecutive rows."""
        begin = self.offsets[first_row]
        self._values[begin : begin + len(logits_AV)] = _bits_of(logits_AV.detach().to("cpu", self.dtype)).numpy()

    def finish(self) -> None:
        """Wait until all ranks have written, then open the file for reading."""
        self._values.flush()
        barrier()
        self._values = np.memmap(self.path, _BITS[self.dtype], "r", shape=self._shape)

    def read(self, rows: Sequence[int]) -> Tensor:
        """Return the logits [A, V] of rows, in their order, on the CPU."""
        # Read from the map: only these rows are in memory.
        parts = [np.asarray(self._values[self.offsets[row] : self.offsets[row + 1]]) for row in rows]
        return torch.from_numpy(np.concatenate(parts)).view(self.dtype)

    def close(self) -> None:
        """Remove the file once all ranks are done."""
        barrier()
        del self._values
        if is_main():
            self.path.unlink()


def keep_logits(engine: nn.Module, batches: MicroBatches, path: Path, description: str) -> KeptLogits:
    """Return the logits that a model gives the answer tokens of rows now, kept in path. A collective.

    Args:
        engine: deepspeed.DeepSpeedEngine. Its modes are restored.
        batches: of the rows, each with input_ids and labels.
        path: of the file.
        description: of the progress bar.
    Cost: one forward pass over the rows, divided over the ranks; answer tokens * vocabulary * bytes of a logit on disk.
    """
    # The file needs every row's number of answer tokens before the first is written.
    counts = num_answer_tokens(batches.rows)
    kept = None
    for first in progress_bar(range(0, len(batches), world_size()), description, unit="round"):
        # A rank without a micro-batch repeats one and does not write it: ZeRO-3 gathers together.
        own = first + rank()
        b = own if own < len(batches) else first
        logits = forward_answers(engine, batches[b])
        # The file's width is that of the logits, which a configuration may not tell.
        if kept is None:
            kept = KeptLogits(path, counts, logits.shape[-1], logits.dtype)
        if own < len(batches):
            kept.write(b * batches.batch_size, logits)
    assert kept is not None
    kept.finish()
    return kept


def num_answer_tokens(rows: Sequence[Any]) -> list[int]:
    """Return how many tokens of each row enter the loss; the first never does."""
    return [sum(label != IGNORED_LABEL for label in row["labels"][1:]) for row in rows]


def answer_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logits [A, V] that predict the answer tokens, row by row."""
    return logits[:, :-1][labels[:, 1:].to(logits.device) != IGNORED_LABEL]


def divergence(now_AV: Tensor, before_AV: Tensor) -> Tensor:
    """Return the sum over A answer tokens of KL(before || now), from logits over V words; fp32, nats."""
    return F.kl_div(
        F.log_softmax(now_AV.float(), dim=-1),
        F.log_softmax(before_AV.float(), dim=-1),
        reduction="sum",
        log_target=True,
    )


def forward_answers(engine: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits [A, V] that predict the answer tokens of a batch, row by row. Modes are restored."""
    batch = {key: value.to(engine.device) for key, value in batch.items()}
    with evaluating(engine):
        return answer_logits(engine(**batch).logits, batch["labels"])


def _bits_of(values: Tensor) -> Tensor:
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values
