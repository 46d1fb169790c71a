"""Read the text that stands for general ability: rows that no task trains."""

from itertools import islice
from pathlib import Path

import datasets
from transformers import ProcessorMixin

from piece_ds.config.arguments import DataArguments
from piece_ds.data.files import first_rows, in_memory, open_source
from piece_ds.data.image_rows import ImagePrompt, encode_image_rows, find_images, has_images
from piece_ds.data.tokenize import Encoder, tokenize_rows
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.runtime.errors import UserError


def load_general(
    path_or_name: str,
    processing: Processing,
    cutoff: int,
    chat_template: bool = False,
    max_rows: int | None = None,
    images: DataArguments | None = None,
) -> datasets.Dataset:
    """Return encoded rows whose loss tells how much general ability is left. No task trains them.

    Args:
        path_or_name: rows of prompt and answer (loss on the answer), of token ids, or of text (loss on all of it, in
            windows), or a .txt file, which is one long text.
        processing: the model's tokenizer or processor.
        cutoff: as in Encoder, in tokens.
        chat_template: as in Encoder.
        max_rows: keep only this many encoded rows, from the first.
        images: settings that say where images are, for a model that reads them.
    Returns:
        Dataset of columns input_ids and labels.
    Raises:
        UserError: the file or a row cannot be used.
    """
    encoder = Encoder(tokenizer_of(processing), cutoff, chat_template)
    if path_or_name.lower().endswith(".txt") and Path(path_or_name).is_file():
        rows = _text_file_rows(Path(path_or_name))
    else:
        source = open_source(path_or_name, images=isinstance(processing, ProcessorMixin))
        # A row makes at least one encoded row, so nothing needed is cut.
        rows = in_memory(islice(source.read(), max_rows), source.features)
    if isinstance(processing, ProcessorMixin) and has_images(rows):
        found = find_images(rows, path_or_name, images or DataArguments())
        return encode_image_rows(found, encoder, ImagePrompt(processing))
    return first_rows(tokenize_rows(rows, encoder, path_or_name), max_rows)


def _text_file_rows(path: Path) -> datasets.Dataset:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text ({error.reason}); re-encode the file") from None
    if not text.strip():
        raise UserError(f"{path} is empty; expected text")
    return datasets.Dataset.from_dict({"text": [text]})
