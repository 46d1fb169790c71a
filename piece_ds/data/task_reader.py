"""Read one file of a task: checked rows with their token ids, and a line that says what the file was taken for."""

import logging
from dataclasses import dataclass
from itertools import islice

from piece_ds.config.arguments import DataArguments
from piece_ds.data.encoded_file import EncodedFile, encode_in_memory
from piece_ds.data.files import in_memory, open_source
from piece_ds.data.formats import parse_columns
from piece_ds.data.image_rows import ImagePrompt, encode_image_rows, find_images, has_images
from piece_ds.data.lengths import lengths_of
from piece_ds.data.rows import CHAT, COMPLETION, PAIR, TOKENS
from piece_ds.data.token_cache import encode_once
from piece_ds.data.tokenize import Encoder

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

    def read(self, path: str, limit: int | None) -> EncodedFile:
        """Return the checked rows of a file, at most limit of them, with their token ids."""
        columns = parse_columns(self.arguments.columns)
        source = open_source(path, self.prompt is not None, columns)
        if self.prompt is None:
            use_cache = self.arguments.tokenized_cache
            return encode_once(source, self.encoder, limit=limit, columns=columns, use_cache=use_cache)

        # Images must be looked for at every start, so rows of a model that reads them are not kept.
        rows = in_memory(islice(source.read(), limit), source.features)
        if not has_images(rows):
            return encode_in_memory(source, self.encoder, limit)
        rows = find_images(rows, path, self.arguments)
        return EncodedFile(rows, encode_image_rows(rows, self.encoder, self.prompt), source.format)

    def show(self, file: EncodedFile, path: str) -> None:
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
        if what.kind in (CHAT, COMPLETION):
            num_cut = int((lengths_of(file.encoded) == encoder.cutoff).sum())
            cut = (
                f"; {num_cut} rows end at {encoder.cutoff} tokens (--max_prompt_len + --max_ans_len)" if num_cut else ""
            )
        kept = f"; tokenized by an earlier run, in {file.kept_in} (--tokenized_cache)" if file.kept_in else ""
        logger.warning("%s: %d rows, %s; %s%s%s", path, len(file.rows), what.name, template, cut, kept)
