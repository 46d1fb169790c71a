"""Collate rows with images: the processor encodes prompts and images, answers follow, and rows are padded as usual."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from piece_ds.data.collate import Collator, pad_id
from piece_ds.data.image_rows import ImagePrompt
from piece_ds.data.images import read_image
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.data.tokenize import split_prompt
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.runtime.errors import UserError

Row = Mapping[str, Any]
_STAND_IN = "stand-in"  # no path: the blank image


@dataclass(frozen=True)
class ImageCollator:
    """Collates rows with images; a callable for DataLoader and Trainer.

    Images are read when a batch is made, in the process that makes it. A batch without any image gets one more row: a
    blank image without labels. It adds nothing to the loss, and its gradients are zero. But every rank then runs the
    vision tower and the projector in every micro-batch. ZeRO-3 gathers parameters on all ranks together, so a rank that
    skipped them would make the others wait forever.

    Attributes:
        processor: the model's.
        pad: collator for the token ids.
    """

    processor: ProcessorMixin
    pad: Collator

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate rows of encode_image_rows(), or any rows with input_ids and labels.

        Returns:
            input_ids, labels, attention_mask and everything else that the processor gives (pixel_values,
            image_grid_thw, ...). Tensors with one entry per token are padded with 0 like the tokens. All others are as
            the processor joins them.
        Raises:
            UserError: an image cannot be read; the message names its row.
        """
        return self._batch(rows, self.pad)

    def prompts(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Collate only the prompts, to generate answers from: without labels, padded on the left to the longest."""
        prompts = [{**row, **_unlabelled(split_prompt(row["input_ids"], row["labels"])[0])} for row in rows]
        batch = self._batch(prompts, Collator(self.pad.pad_id, multiple=1, side="left"))
        del batch["labels"]
        return batch

    def _batch(self, rows: Sequence[Row], pad: Collator) -> dict[str, Tensor]:
        # Every rank must run the vision tower: see the class.
        whole = [*rows] if any(row.get("image") for row in rows) else [*rows, self._stand_in()]
        # The processor sees only rows with images; the other rows are token ids already.
        unfolded, joined = self._unfold([row for row in whole if row.get("image")])
        remaining = iter(unfolded)
        sequences = [_with_answer(next(remaining), row["labels"]) if row.get("image") else row for row in whole]
        batch = pad(sequences)
        for name in unfolded[0].keys() - {"input_ids"}:
            batch[name] = _padded([sequence.get(name) for sequence in sequences], pad, batch["input_ids"].shape[1])
        return batch | joined

    def _unfold(self, rows: list[Row]) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return what the processor makes of rows with images.

        Returns:
            For each row, the tensors with one entry per token of its prompt, without padding. Then the tensors that
            belong to the images of all rows together.
        """
        texts = [row["text"] for row in rows]
        options = ImagePrompt(self.processor).options(texts[0])
        # Padded on the left, so that every prompt ends where its answer will begin.
        encoded = self.processor(
            text=texts,
            images=[[_image_of(row)] for row in rows],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **options,
        )
        mask = encoded.pop("attention_mask").bool()
        # Tensors with one entry per token have the mask's shape; the others belong to images.
        along = [name for name, tensor in encoded.items() if tensor.shape[:2] == mask.shape]
        for name in along:
            if name != "input_ids":
                _require_marks_of_images(name, encoded[name])
        unfolded = [{name: encoded[name][index][mask[index]] for name in along} for index in range(len(rows))]
        return unfolded, {name: tensor for name, tensor in encoded.items() if name not in along}

    def _stand_in(self) -> Row:
        text = ImagePrompt(self.processor).text("", with_image=True)
        return {"labels": [], "text": text, "image": _STAND_IN}


def make_collator(processing: Processing) -> Collator | ImageCollator:
    """Return the collator for rows of a tokenizer or a processor. Raise UserError if there is no token to pad with."""
    pad = Collator(pad_id=pad_id(tokenizer_of(processing)))
    return ImageCollator(processing, pad) if isinstance(processing, ProcessorMixin) else pad


def check_processor(processing: Processing) -> None:
    """Raise UserError unless batches can be made of what a processor gives. One blank image is tried."""
    if isinstance(processing, ProcessorMixin):
        make_collator(processing)([])


def _require_marks_of_images(name: str, tensor: Tensor) -> None:
    """Raise UserError unless a per-token tensor is 0 for text and not 0 for images: then 0 is right for an answer too.

    PaliGemma's token types say which tokens see later ones. Mllama's cross-attention mask says which tokens see the
    image. Zeros there would let answers see themselves, or hide the image from them.
    """
    if tensor[:, -1].any() or not tensor.flatten(1).any(dim=1).all():
        raise UserError(
            f"the model's processor gives {name} for every token and does not mark images by it: what it "
            "is for an answer is not known, so models of this kind cannot be used here"
        )


def _image_of(row: Row) -> Image.Image:
    return Image.new("RGB", (32, 32)) if row["image"] == _STAND_IN else read_image(row["image"], row["where"])


def _unlabelled(ids: list[int]) -> Row:
    return {"input_ids": ids, "labels": [IGNORED_LABEL] * len(ids)}


def _with_answer(prompt: dict[str, Tensor], labels: Sequence[int]) -> dict[str, Tensor]:
    """Return an unfolded prompt followed by its counted labels. Other per-token tensors are 0 over the answer."""
    answer = torch.tensor([label for label in labels if label != IGNORED_LABEL], dtype=torch.int64)
    longer = {name: torch.cat([row, row.new_zeros(len(answer), *row.shape[1:])]) for name, row in prompt.items()}
    ids = torch.cat([prompt["input_ids"], answer])
    ignored = torch.full_like(prompt["input_ids"], IGNORED_LABEL)
    return {**longer, "input_ids": ids, "labels": torch.cat([ignored, answer])}


def _padded(rows: list[Tensor | None], pad: Collator, length: int) -> Tensor:
    """Return rows padded with zeros in the places where pad puts tokens. A row without the tensor is all zeros."""
    like = next(row for row in rows if row is not None)
    padded = like.new_zeros(len(rows), length, *like.shape[1:])
    for index, row in enumerate(rows):
        if row is not None:
            padded[index, pad.place(len(row), length)] = row
    return padded
