"""Models that write no text from left to right: encoder-decoders, classifiers, and those that see or hear."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Generator, Tensor, nn

VOCAB, WIDTH, NUM_CLASSES = 61, 20, 3
_BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 5, "intermediate_size": 33, "initializer_range": 0.2}
_STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TWO_STACKS = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 5,
    "decoder_attention_heads": 5,
    "encoder_ffn_dim": 33,
    "decoder_ffn_dim": 33,
    "init_std": 0.2,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        make: the model, its weights drawn from the global generator.
        batch: micro-batch number b, of two rows.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, Generator], Batch]


def _tokens(length: int, generator: Generator) -> Tensor:
    return torch.randint(3, VOCAB, (2, length), generator=generator)


def _classes(generator: Generator) -> Tensor:
    return torch.randint(0, NUM_CLASSES, (2,), generator=generator)


def _written(b: int, generator: Generator) -> Batch:
    return {"input_ids": _tokens(6 + 3 * (b % 4), generator), "labels": _tokens(4 + b % 3, generator)}


def _filled_in(b: int, generator: Generator) -> Batch:
    length = 6 + 3 * (b % 4)
    return {"input_ids": _tokens(length, generator), "labels": _tokens(length, generator)}


def _sorted(b: int, generator: Generator) -> Batch:
    return {"input_ids": _tokens(6 + 3 * (b % 4), generator), "labels": _classes(generator)}


def _seen(b: int, generator: Generator) -> Batch:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": _classes(generator)}


def _transcribed(b: int, generator: Generator) -> Batch:
    return {"input_features": torch.randn(2, 8, 20, generator=generator), "labels": _tokens(4 + b % 3, generator)}


def _heard(b: int, generator: Generator) -> Batch:
    return {"input_values": torch.randn(2, 400 + 40 * b, generator=generator), "labels": _classes(generator)}


def _bert(cls: Any, **more: Any) -> nn.Module:
    config = hf.BertConfig(vocab_size=VOCAB, hidden_size=WIDTH, max_position_embeddings=32, **_BLOCKS, **_STILL, **more)
    model: nn.Module = cls(config)
    return model


def _wav2vec2() -> nn.Module:
    return hf.Wav2Vec2ForSequenceClassification(
        hf.Wav2Vec2Config(
            hidden_size=WIDTH,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=5,
            num_labels=NUM_CLASSES,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.0,
            **_BLOCKS,
        )
    )


OTHER_KINDS = {
    "bart": Kind(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**_TWO_STACKS)), _written),
    "bert-masked": Kind(lambda: _bert(hf.BertForMaskedLM), _filled_in),
    "bert-classifier": Kind(lambda: _bert(hf.BertForSequenceClassification, num_labels=NUM_CLASSES), _sorted),
    "vit": Kind(
        lambda: hf.ViTForImageClassification(
            hf.ViTConfig(hidden_size=WIDTH, image_size=16, patch_size=4, num_labels=NUM_CLASSES, **_BLOCKS, **_STILL)
        ),
        _seen,
    ),
    "whisper": Kind(
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(num_mel_bins=8, max_source_positions=10, max_target_positions=20, **_TWO_STACKS)
        ),
        _transcribed,
    ),
    "wav2vec2": Kind(_wav2vec2, _heard),
}


def make_other(name: str) -> nn.Module:
    """The model of OTHER_KINDS, in training mode, the same at every call."""
    torch.manual_seed(26)
    model = OTHER_KINDS[name].make().train()
    for parameter_name, param in model.named_parameters():  # what a key's bias adds, softmax takes away: rounding alone
        param.requires_grad_(not parameter_name.endswith(("k_proj.bias", "key.bias")))
    return model


def other_batches(name: str, num: int) -> list[Batch]:
    """Micro-batches of two rows."""
    generator = torch.Generator().manual_seed(6)
    return [OTHER_KINDS[name].batch(b, generator) for b in range(num)]
