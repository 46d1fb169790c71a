"""General text: rows that no task trains, whose loss tells how much general ability is left."""

from pathlib import Path

import datasets
from transformers import ProcessorMixin

from piece_ds.config import DataArguments
from piece_ds.errors import UserError
from piece_ds.stream.encode import Encoder
from piece_ds.stream.files import first_rows, load_rows
from piece_ds.stream.image_prompt import ImagePrompt
from piece_ds.stream.image_rows import encode_image_rows, find_images, has_images
from piece_ds.stream.processor import Processing, tokenizer_of
from piece_ds.stream.tokenize import tokenize_rows


def load_general(
    path_or_name: str,
    processing: Processing,
    cutoff: int,
    chat_template: bool = False,
    max_rows: int | None = None,
    images: DataArguments | None = None,
) -> datasets.Dataset:
    """Rows whose loss tells how much general ability is left; no task trains them.

    Args:
        path_or_name: rows of prompt and answer (loss on the answer), of token ids, or of {"text"} (loss on all of
            it, cut into windows), or a .txt file, which is one long text.
        processing: the model's tokenizer or processor.
        cutoff: as in Encoder.
        max_rows: keep only the first so many encoded rows.
        images: where a model that reads images finds those of the rows.
    Returns:
        Dataset of columns input_ids and labels.
    """
    encoder = Encoder(tokenizer_of(processing), cutoff, chat_template)
    if path_or_name.lower().endswith(".txt") and Path(path_or_name).is_file():
        rows = _text_file_rows(Path(path_or_name))
    else:
        rows = load_rows(path_or_name, allow_text=True, images=isinstance(processing, ProcessorMixin))
    if max_rows is not None:
        rows = first_rows(rows, max_rows)  # a row makes at least one encoded row, so nothing needed is cut
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
