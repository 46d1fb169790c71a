"""Read one file of a task: checked rows, then token ids, and a line that says what the file was taken for."""

import logging
from dataclasses import dataclass

import datasets
import pyarrow.compute

from piece_ds.config.arguments import DataArguments
from piece_ds.data.files import DataFile, first_rows, read_data_file
from piece_ds.data.formats import parse_columns
from piece_ds.data.image_rows import ImagePrompt, encode_image_rows, find_images, has_images
from piece_ds.data.rows import CHAT, COMPLETION, PAIR, TOKENS
from piece_ds.data.tokenize import Encoder, tokenize_rows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskReader:
    """Reads files into encoded rows.

    Attributes:
        arguments: settings of the data.
        encoder: of texts.
        prompt: how an image stands in a prompt; None for a model that reads no images.
        seed: of what is drawn.
    """

    arguments: DataArguments
    encoder: Encoder
    prompt: ImagePrompt | None
    seed: int

    def load(self, path: str, limit: int | None) -> DataFile:
        """Return the checked rows of a file, at most limit of them."""
        file = read_data_file(path, self.prompt is not None, parse_columns(self.arguments.columns))
        rows = first_rows(file.rows, limit)
        return DataFile(find_images(rows, path, self.arguments) if has_images(rows) else rows, file.format)

    def encode(self, rows: datasets.Dataset, path: str) -> datasets.Dataset:
        """Return rows as token ids. path is for messages."""
        if self.prompt is not None and has_images(rows):
            return encode_image_rows(rows, self.encoder, self.prompt)
        return tokenize_rows(rows, self.encoder, path, documents=True)

    def show(self, file: DataFile, encoded: datasets.Dataset, path: str) -> None:
        """Log in one line what a file was taken for."""
        what, encoder = file.format, self.encoder
        has_template = bool(encoder.tokenizer.chat_template)
        if what.kind == CHAT and encoder.templates_conversations:
            template = "chat template used, loss on the assistant's turns"
        elif what.kind == CHAT:
            template = "no chat template: question and answer stand plain"
        elif what.kind in (PAIR, COMPLETION) and encoder.chat_template:
            template = "chat template used, loss on the answer"
        elif what.kind in (PAIR, COMPLETION):
            template = "chat template not used" + (
                " (--chat_template true uses it)" if has_template else ": there is none"
            )
        else:
            template = "used as they are" if what.kind == TOKENS else "loss on all of it"
        cut = ""
        if what.kind in (CHAT, COMPLETION) and len(encoded):
            lengths = pyarrow.compute.list_value_length(encoded.data.column("input_ids"))
            num_cut = pyarrow.compute.sum(pyarrow.compute.equal(lengths, encoder.cutoff)).as_py()
            cut = (
                f"; {num_cut} rows end at {encoder.cutoff} tokens (--max_prompt_len + --max_ans_len)" if num_cut else ""
            )
        logger.warning("%s: %d rows, %s; %s%s", path, len(file.rows), what.name, template, cut)
