"""Tiny vision-language models with sizes that divide by nothing, and questions for them with and without an image."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ProcessorMixin,
    Qwen3VLForConditionalGeneration,
)

from piece_ds.data.image_collate import make_collator
from piece_ds.data.image_rows import ImagePrompt
from piece_ds.demo.model import VOCAB_SIZE
from piece_ds.demo.vision.drawings import random_drawing
from piece_ds.demo.vision.models import make_processor, qwen3_vl_config

FAMILIES = ("llava", "qwen3-vl")
# By hand: what a mask may not touch unless it is asked for.
TOWERS = {
    "llava": ("model.vision_tower.",),
    "qwen3-vl": ("model.visual.blocks.", "model.visual.patch_embed.", "model.visual.pos_embed."),
}
EMBEDDING = "model.language_model.embed_tokens.weight"
# (question, answer, width and height of the image or None); micro-batches are of two rows, the third and sixth without
# any image, the second and fourth with one. Sizes differ, so that Qwen3-VL's grids do.
QUESTIONS = [
    ("how many?", "4", (24, 24)),
    ("what?", "a cat", (24, 32)),
    ("who is it?", "me", None),
    ("where?", "here", (30, 16)),
    ("a", "bc", None),
    ("say", "ah", None),
    ("more of it?", "no", (16, 40)),
    ("which one", "b", None),
    ("two?", "2", (24, 24)),
    ("red", "red", (24, 24)),
    ("no image", "ok", None),
    ("none", "yes", None),
    ("last one?", "yes", (40, 24)),
]


def make_vision_model(family: str) -> nn.Module:
    """The same weights at every call."""
    torch.manual_seed(13)
    text = {
        "vocab_size": VOCAB_SIZE + 4,
        "hidden_size": 35,
        "intermediate_size": 41,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "initializer_range": 0.2,
        "tie_word_embeddings": family == "llava",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=21,
            intermediate_size=23,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=24,
            patch_size=4,
            initializer_factor=5.0,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**text),
            image_token_index=VOCAB_SIZE,
            image_seq_length=36,
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config).train()
        for name, param in model.named_parameters():  # what a key's bias adds, softmax takes away: rounding alone
            param.requires_grad_(not name.endswith("k_proj.bias"))
        return model
    config = qwen3_vl_config(text)
    config.vision_config.hidden_size, config.vision_config.num_heads = 24, 3
    config.vision_config.intermediate_size, config.vision_config.initializer_range = 29, 0.2
    config.tie_word_embeddings = False
    return Qwen3VLForConditionalGeneration(config).train()


def is_in_tower(family: str, name: str) -> bool:
    return name.startswith(TOWERS[family])


@cache
def image_of(index: int) -> Image.Image:
    from random import Random

    return random_drawing(Random(index)).draw(24).resize(QUESTIONS[index][2])


def vision_micro_batches(family: str, num: int) -> list[dict[str, Tensor]]:
    """Micro-batches of two rows as training makes them: images as files, through the project's own collator."""
    processor = make_processor(family)
    prompt = ImagePrompt(processor)
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows_with_images(prompt, processor, Path(folder))
        collate = make_collator(processor)
        return [collate(rows[2 * b : 2 * b + 2]) for b in range(num)]


def _rows_with_images(prompt: ImagePrompt, processor: Any, folder: Path) -> list[dict[str, Any]]:
    """Rows of the questions; their images are written into folder."""
    rows = []
    for index, (question, answer, size) in enumerate(QUESTIONS):
        text = prompt.text(question, with_image=size is not None)
        ids, reply = prompt.ids(text), _ids(processor, answer)
        path = None
        if size is not None:
            path = str(folder / f"{index}.png")
            image_of(index).save(path)
        rows.append(
            {
                "input_ids": ids + reply,
                "labels": [-100] * len(ids) + reply,
                "text": text,
                "image": path,
                "where": f"row {index}",
            }
        )
    return rows


def plain_micro_batches(family: str, num: int) -> list[dict[str, Tensor]]:
    """The same in as few words as possible, for an oracle: padded on the right, nothing stands in for an image."""
    processor, batches = make_processor(family), []
    for b in range(num):
        asked = list(enumerate(QUESTIONS))[2 * b : 2 * b + 2]
        rows, pixels = [], []
        for index, (question, answer, size) in asked:
            turn = [{"type": "image"}] * (size is not None) + [{"type": "text", "text": question}]
            text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
            given = {} if size is None else {"images": image_of(index)}
            row = processor(text=text, **given, return_tensors="pt")
            prompt, reply = row["input_ids"][0].tolist(), _ids(processor, answer)
            kinds = row["mm_token_type_ids"][0].tolist() if "mm_token_type_ids" in row else [0] * len(prompt)
            rows.append((prompt + reply, [-100] * len(prompt) + reply, kinds + [0] * len(reply)))
            if size is not None:
                pixels.append({key: row[key] for key in row.keys() & {"pixel_values", "image_grid_thw"}})
        batches.append(_right_padded(rows) | {key: torch.cat([p[key] for p in pixels]) for key in (pixels or [{}])[0]})
        if family == "llava":
            del batches[-1]["mm_token_type_ids"]
    return batches


def _right_padded(rows: list[tuple[list[int], list[int], list[int]]]) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _, _ in rows)
    columns = zip(
        *[
            [column + [fill] * (longest - len(column)) for column, fill in zip(row, (0, -100, 0), strict=True)]
            for row in rows
        ],
        strict=True,
    )
    batch = dict(zip(("input_ids", "labels", "mm_token_type_ids"), map(torch.tensor, columns), strict=True))
    lengths = torch.tensor([[len(ids)] for ids, _, _ in rows])
    return batch | {"attention_mask": (torch.arange(longest) < lengths).long()}


def _ids(processor: ProcessorMixin, answer: str) -> list[int]:
    return [*processor.tokenizer(answer, add_special_tokens=False)["input_ids"], 2]
