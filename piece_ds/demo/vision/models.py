"""Small untrained LLaVA and Qwen3-VL models with their processors, from transformers' own classes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from piece_ds.demo.model import BOS, EOS, PAD, SPECIAL_TOKENS, VOCAB_SIZE, make_tokenizer
from piece_ds.models.processor import images_only

FAMILIES = ("llava", "qwen3-vl")
MAX_LENGTH = 256
IMAGE_SIZE = 24
PATCH_SIZE = 4
_IMAGE_TOKENS = {
    "llava": ("<image>",),
    "qwen3-vl": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
}
_IMAGE_IN_TEMPLATE = {"llava": "<image>", "qwen3-vl": "<|vision_start|><|image_pad|><|vision_end|>"}


def write_model(family: str, folder: Path, seed: int, words: Sequence[str] = ()) -> None:
    """Write an untrained model of FAMILIES in fp32 with its processor, as a transformers folder.

    Args:
        family: one of FAMILIES.
        folder: to write to.
        seed: of the weights. The global generator is not changed.
        words: each becomes one token.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_model(family, len(words)).save_pretrained(folder)
    make_processor(family, words).save_pretrained(folder)


def make_processor(family: str, words: Sequence[str] = ()) -> ProcessorMixin:
    """Return a processor: a tokenizer of bytes and words, an image processor, and a chat template.

    The template puts the image before the question.
    """
    tokenizer = _tokenizer(family, words)
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + _IMAGE_IN_TEMPLATE[family] + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %} {% endif %}"
    )
    if family == "llava":
        side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        images = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=side)
        return LlavaProcessor(
            images,
            tokenizer,
            patch_size=PATCH_SIZE,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    pixels = {"shortest_edge": (2 * PATCH_SIZE) ** 2, "longest_edge": (2 * IMAGE_SIZE) ** 2}
    images = Qwen2VLImageProcessorPil(patch_size=PATCH_SIZE, merge_size=2, temporal_patch_size=2, size=pixels)
    return images_only(Qwen3VLProcessor)(images, tokenizer, chat_template=template)


def make_model(family: str, num_words: int = 0) -> PreTrainedModel:
    """Return the model, with weights drawn from the global generator."""
    text = {
        "vocab_size": VOCAB_SIZE + len(_IMAGE_TOKENS[family]) + num_words,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 24,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
    }
    if family == "llava":
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=64,
        )
        return LlavaForConditionalGeneration(
            LlavaConfig(
                vision_config=vision,
                text_config=LlamaConfig(**text),
                image_token_index=VOCAB_SIZE,
                vision_feature_layer=-1,
                image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
                tie_word_embeddings=True,
            )
        )
    return Qwen3VLForConditionalGeneration(qwen3_vl_config(text))


def qwen3_vl_config(text: dict) -> Qwen3VLConfig:
    """Return a Qwen3-VL configuration with this text part and a small vision part."""
    tokens = dict(zip(("image", "video", "vision_start", "vision_end"), range(VOCAB_SIZE, VOCAB_SIZE + 4), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4], "mrope_interleaved": True}
    return Qwen3VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.1,
        },
        tie_word_embeddings=True,
        **{f"{name}_token_id": value for name, value in tokens.items()},
    )


def _tokenizer(family: str, words: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer(MAX_LENGTH)
    tokenizer.add_special_tokens({"additional_special_tokens": list(_IMAGE_TOKENS[family])})
    # Whole words as tokens: spelling is no part of what is to be learned.
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True, normalized=False) for word in words])
    return tokenizer
