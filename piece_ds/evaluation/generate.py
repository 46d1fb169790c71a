"""Greedy answers to many prompts, with the work dealt over ranks and every answer on every rank."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from piece_ds.distributed import all_gather_objects, world_size
from piece_ds.evaluation.dealing import deal_batches
from piece_ds.evaluation.mode import evaluating


def generate_texts(
    model: nn.Module,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str,
    synced_gpus: bool | None = None,
) -> list[str]:
    """What model writes after each prompt, the likeliest token each time; call it on every rank.

    Args:
        model: a causal model of transformers, or the DeepSpeed engine around one. Its training mode is restored.
        prompts: token ids of each prompt, at least one id each, the same on every rank.
        tokenizer: the model's; its pad (or EOS) token pads on the left, its EOS token ends an answer, besides those
            of the model's own generation settings, of which nothing else is used.
        max_new_tokens: most tokens of an answer, >= 1.
        batch_size: prompts generated together.
        device: where the batches go.
        synced_gpus: whether every rank must keep making forward passes until the last has finished; None looks
            whether the parameters are partitioned (ZeRO-3).
    Returns:
        The texts in the order of prompts, without special tokens, on every rank.
    Cost: prompts / (batch_size * ranks) rounds of up to max_new_tokens passes; the texts go through pickle once.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt to generate from needs at least one token id")
    module = getattr(model, "module", model)
    synced = is_partitioned(module) if synced_gpus is None else synced_gpus
    config = greedy_config(module, tokenizer, max_new_tokens)
    texts: list[tuple[int, str]] = []
    with evaluating(model), no_generation_defaults(module):
        for share in deal_batches([len(prompt) for prompt in prompts], batch_size):
            if not share.counted and not synced:
                continue
            ids, mask = pad_left([prompts[index] for index in share.indices], cast(int, config.pad_token_id))
            written = module.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                synced_gpus=synced and world_size() > 1,
            )
            if share.counted:
                answers = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
                texts += zip(share.indices, answers, strict=True)
    gathered = cast(list[list[tuple[int, str]]], all_gather_objects(texts))
    return [text for _, text in sorted(pair for of_rank in gathered for pair in of_rank)]


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed has partitioned the parameters (ZeRO-3), so that a forward pass needs every rank."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def greedy_config(module: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy settings; an answer ends at the tokenizer's EOS or one of the model's own (chat models have several)."""
    own = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=0 if pad is None else pad,
        eos_token_id=sorted(ends) or None,
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )


@contextmanager
def no_generation_defaults(module: nn.Module) -> Iterator[None]:
    """Inside, generate() finds no settings in the model: it would fill ours with theirs (a repetition penalty of 1.05
    comes with some models' files and changes greedy answers)."""
    kept = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = kept


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64, padded on the left to the longest prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
