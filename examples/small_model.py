"""A small model and rows to train it on, made here so that the examples need no network."""

import os

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, LENGTH = 128, 32


def on_one_process() -> None:
    """Tell DeepSpeed that a script started with plain python is rank 0 of 1, on the CPU if there is no GPU."""
    if "RANK" not in os.environ:
        # Port 0: torch takes one that is free.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def make_model(seed: int = 0) -> LlamaForCausalLM:
    """Return an untrained Llama of about 0.1 M parameters, with the same weights at every call."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def make_rows(num_rows: int = 64, seed: int = 1) -> list[dict[str, list[int]]]:
    """Return rows of token ids that count upwards by a step of their own, which the model can learn."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCABULARY, (num_rows,), generator=generator).tolist()
    steps = torch.randint(1, 4, (num_rows,), generator=generator).tolist()
    texts = [
        [(start + step * i) % VOCABULARY for i in range(LENGTH)] for start, step in zip(starts, steps, strict=True)
    ]
    return [{"input_ids": ids, "labels": ids} for ids in texts]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return rows as a batch."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def copy_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return every weight as it is now."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def count_changed(before: dict[str, Tensor], model: torch.nn.Module) -> int:
    """Return how many weights have other bits than before."""
    now = dict(model.named_parameters())
    return sum(
        int((values.view(torch.int32) != now[name].detach().view(torch.int32)).sum()) for name, values in before.items()
    )
