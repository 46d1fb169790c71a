"""Keep what the base model says of general text, from before the first task to the end of the stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from piece_ds.data.collate import MicroBatches
from piece_ds.evaluation.kept_logits import KeptLogits, keep_logits, num_answer_tokens
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_json
from piece_ds.runtime.schema import Count, read_json
from piece_ds.training.general_statistics import digest_of

FILE, INDEX = "base.bin", "base.json"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Index(BaseModel):
    """Content of base.json. It is written last: with it, the logits are complete."""

    text: str
    vocabulary: Count
    dtype: Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class BaseLogits:
    """Where the base model's logits of general text are, or will be.

    Attributes:
        rows: text that stands for general ability.
        collate: rows -> batch.
        batch_size: rows of a forward pass.
        folder: where they are kept; all nodes must see it.
        is_base: whether the model is still the base model, so no task has been trained.
    """

    rows: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, Tensor]]
    batch_size: int
    folder: Path
    is_base: bool

    def take(self, engine: Any, has_moved: bool = False) -> KeptLogits:
        """Return the logits: taken now if the model is the base model, else read. A collective.

        Args:
            engine: deepspeed.DeepSpeedEngine.
            has_moved: whether the weights are those of a checkpoint inside a task.
        Raises:
            UserError: the model is no longer the base model, and its logits are not in the folder, or of other text.
        Cost: see keep_logits(), once for a stream.
        """
        batches = MicroBatches(self.rows, self.collate, self.batch_size)
        text, path, index_path = digest_of(batches), self.folder / FILE, self.folder / INDEX

        # The base model: take them. Without an index they count as incomplete.
        if self.is_base and not has_moved:
            if is_main():
                index_path.unlink(missing_ok=True)
            kept = keep_logits(engine, batches, path, "base logits")
            if is_main():
                dtype = str(kept.dtype).removeprefix("torch.")
                write_json(index_path, {"text": text, "vocabulary": kept.vocabulary, "dtype": dtype})
            barrier()
            return kept

        # Later: read them.
        if not broadcast_object(index_path.is_file() and path.is_file()):
            raise UserError(
                f"no logits of the base model in {self.folder}, and the model is no longer the base model: begin the "
                "stream again in another folder"
            )
        index = read_json(index_path, _Index, "index of the base model's logits", "begin the stream again")
        if index.text != text:
            raise UserError(f"{self.folder} holds the base model's logits of other text: resume with the same text")
        kept_tokens = num_answer_tokens(self.rows)
        expected = sum(kept_tokens) * index.vocabulary * _DTYPES[index.dtype].itemsize
        if path.stat().st_size != expected:
            raise UserError(f"{path} has {path.stat().st_size} bytes, expected {expected}: begin the stream again")
        return KeptLogits(path, kept_tokens, index.vocabulary, _DTYPES[index.dtype], is_new=False)
