"""Rows of prompt, answer and image: check them, find their images, and encode all but the image itself."""

import logging
from dataclasses import dataclass
from typing import Any

import datasets
from datasets import Features, Sequence, Value
from transformers import ProcessorMixin

from piece_ds.config.arguments import DataArguments
from piece_ds.data.images import ImageFolder, check_header, read_image
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.data.template_limits import rendered
from piece_ds.data.tokenize import Encoder
from piece_ds.runtime.errors import UserError


@dataclass(frozen=True)
class ImagePrompt:
    """Puts a question, with an image before it, into the user's turn.

    Attributes:
        processor: of a model that reads images; it must have a chat template.
    Raises:
        UserError: the processor has no chat template.
    """

    processor: ProcessorMixin

    def __post_init__(self) -> None:
        if not self.processor.chat_template:
            raise UserError(
                "the model's processor has no chat template, so where the image stands in a prompt is not "
                "known; add a chat_template.jinja to the model's files"
            )

    def text(self, prompt: str, with_image: bool, where: str = "a prompt") -> str:
        """Return the turn as text, up to where the answer begins. The image is one token; the processor expands it.

        Args:
            prompt, with_image: the question, and whether an image stands before it.
            where: file and row, for messages.
        Raises:
            UserError: the template cannot render it, or leaves the question out.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
        if with_image:
            content.insert(0, {"type": "image"})
        turn = [{"role": "user", "content": content}]
        text: str = rendered(
            lambda: self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), where
        )
        if "".join(prompt.split()) not in "".join(text.split()):  # templates may trim, and fold blanks
            raise UserError(f"{where}: the processor's chat template does not write the question; mend it")
        return text

    def ids(self, text: str) -> list[int]:
        """Return the token ids of text(), with the image still one token."""
        return self.processor.tokenizer(text, **self.options(text))["input_ids"]

    def options(self, text: str) -> dict[str, bool]:
        """Return options for the tokenizer: no special tokens if the template has already written BOS."""
        bos = self.processor.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


logger = logging.getLogger(__name__)

ENCODED = Features(
    {
        "input_ids": Sequence(Value("int32")),
        "labels": Sequence(Value("int32")),
        "text": Value("string"),
        "image": Value("string"),
        "where": Value("string"),
    }
)


def has_images(rows: datasets.Dataset) -> bool:
    """Return whether any row names an image."""
    return "image" in rows.column_names and any(rows["image"])


def find_images(rows: datasets.Dataset, source: str, arguments: DataArguments) -> datasets.Dataset:
    """Return rows with the path of each image on disk, and a column `where` that names the row.

    Args:
        rows: from load_rows(images=True).
        source: their file.
        arguments: image_dir and skip_bad_images are used.
    Raises:
        UserError: an image is missing or broken and skip_bad_images is off, or no row is left.
    Cost: opens every image once. With skip_bad_images it also decodes them, so that every rank leaves out the same
        rows.
    """

    # Check every image now: a bad one later would stop one of many ranks in the middle of a task.
    folder = ImageFolder(arguments.image_dir, source)
    kept: list[int] = []
    paths: list[str | None] = []
    first_bad = ""
    for index, path in enumerate(rows["image"]):
        try:
            found = _checked(folder, path, f"{source} row {index + 1}", arguments.skip_bad_images)
        except UserError as error:
            if not arguments.skip_bad_images:
                raise
            first_bad = first_bad or str(error)
            continue
        kept.append(index)
        paths.append(found)

    # Say what was left out.
    if first_bad:
        bad = len(rows) - len(kept)
        logger.warning("%s: %d of %d rows left out for their images; the first: %s", source, bad, len(rows), first_bad)
    if not kept:
        raise UserError(f"{source}: no row has an image that can be read; the first: {first_bad}")

    # Row numbers are those of the file, whatever was left out.
    where = [f"{source} row {index + 1}" for index in kept]
    chosen = rows.select(kept).remove_columns("image").add_column("image", paths, feature=Value("string"))
    return chosen.add_column("where", where, feature=Value("string"))


def _checked(folder: ImageFolder, path: str | None, where: str, decode: bool) -> str | None:
    """Return where the image of a row lies; None if the row has no image."""
    if not path:
        return None
    found = folder.find(path)
    if found is None:
        raise UserError(
            f"{where}: no image {path} below {folder.root}; say where images are with --image_dir, or "
            "leave such rows out with --skip_bad_images"
        )
    if decode:
        read_image(found, where)
    else:
        check_header(found, where)
    return str(found)


def encode_image_rows(rows: datasets.Dataset, encoder: Encoder, prompt: ImagePrompt) -> datasets.Dataset:
    """Return rows of find_images() as token ids of prompt and answer. The image is the one token of the template.

    The prompt is not cut to the encoder's cutoff. A cut could fall inside the image, whose size the processor limits.

    Args:
        rows: from find_images().
        encoder: encodes the answers.
        prompt: writes the prompts.
    Returns:
        Dataset with the columns of ENCODED: input_ids and labels as for text rows, the prompt's text, image path and
            row.
    Raises:
        UserError: an answer without a token.
    """

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        text = prompt.text(row["prompt"], with_image=bool(row["image"]), where=row["where"])
        ids, answer = prompt.ids(text), encoder.answer_ids(row["answer"])
        if not answer:
            raise UserError(
                f"{row['where']}: no answer token is left after tokenization of {row['answer'][:40]!r}; remove the row"
            )
        return {
            "input_ids": ids + answer,
            "labels": [IGNORED_LABEL] * len(ids) + answer,
            "text": text,
            "image": row["image"],
            "where": row["where"],
        }

    return datasets.Dataset.from_list([encode(row) for row in rows], features=ENCODED)
