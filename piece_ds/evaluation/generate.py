"""Answers to many prompts, greedy or drawn, with the work dealt over ranks and every answer on every rank."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from piece_ds.evaluation.batches import evaluating, shard_batches
from piece_ds.evaluation.padding import answers_alone
from piece_ds.runtime.distributed import all_gather_objects, world_size
from piece_ds.runtime.progress import progress_bar
from piece_ds.runtime.signals import exit_if_signalled
from piece_ds.state.partition import is_partitioned


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        sample: draw it; False takes the likeliest.
        temperature, top_k, top_p: of drawing; the defaults are those of the method's authors.
        seed: of drawing. Every batch is drawn from a state of its own, so that texts do not depend on the ranks.
    """

    sample: bool = False
    temperature: float = 0.3
    top_k: int = 10
    top_p: float = 0.95
    seed: int = 42

    def config(self) -> dict[str, Any]:
        """The settings as GenerationConfig takes them."""
        if not self.sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


GREEDY = Decoding()


@dataclass(frozen=True)
class Generated:
    """Texts with what they cost.

    Attributes:
        texts: in the order of the prompts, without special tokens.
        num_tokens: tokens generated, the ending one of each text included, padding not.
        seconds: wall time on this rank.
        token_ids: of each text, the ending one included.
    """

    texts: list[str]
    num_tokens: int
    seconds: float
    token_ids: list[list[int]] = field(default_factory=list, repr=False)


def generate_texts(
    model: nn.Module,
    prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    batch_size: int,
    device: torch.device | str,
    decoding: Decoding = GREEDY,
    synced_gpus: bool | None = None,
    description: str = "generating",
    batch_of: Callable[[list[int]], dict[str, Tensor]] | None = None,
) -> Generated:
    """What model writes after each prompt; call it on every rank.

    Args:
        model: a causal model of transformers, or the DeepSpeed engine around one. Its training mode is restored.
        prompts: token ids of each prompt, at least one id each, the same on every rank.
        tokenizer: the model's; its pad (or EOS) token pads on the left, its EOS token ends an answer, besides those
            of the model's own generation settings, of which nothing else is used.
        max_new_tokens: most tokens of an answer, >= 1.
        batch_size: prompts generated together; the longest come first, neighbours in length together. Of a model whose
            answers padding changes, prompts are generated from one at a time.
        device: where the batches go.
        decoding: greedy, or drawn.
        synced_gpus: whether every rank must keep making forward passes until the last has finished; None looks
            whether the parameters are partitioned (ZeRO-3).
        description: of the progress bar.
        batch_of: indices of prompts to the model's inputs, padded on the left, where there are others than token ids;
            rows after those asked for are not looked at. The lengths of prompts then only say what goes together.
    Returns:
        The same texts and number of tokens on every rank.
    Cost: prompts / (batch_size * ranks) rounds of up to max_new_tokens passes; the texts go through pickle once.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt to generate from needs at least one token id")
    begin = time.perf_counter()
    module = getattr(model, "module", model)
    synced = is_partitioned(*module.parameters()) if synced_gpus is None else synced_gpus
    config = generation_config(module, tokenizer, max_new_tokens, decoding)
    found: list[tuple[int, str, list[int]]] = []
    lengths = [len(prompt) for prompt in prompts]
    inputs_of = batch_of or partial(_padded, prompts, cast(int, config.pad_token_id))
    with evaluating(model), no_generation_defaults(module):
        if batch_size > 1 and answers_alone(module, lengths, inputs_of, config, device, synced and world_size() > 1):
            batch_size = 1
        shares = shard_batches(lengths, batch_size)
        for share in progress_bar(shares, description, unit="batch"):
            exit_if_signalled("during an evaluation")
            if not share.counted and not synced:
                continue
            inputs = inputs_of(share.indices)
            with _drawing_from(decoding.seed + share.indices[0], torch.device(device), decoding.sample):
                written = module.generate(
                    **{name: tensor.to(device) for name, tensor in inputs.items()},
                    generation_config=config,
                    synced_gpus=synced and world_size() > 1,
                )[: len(share.indices), inputs["input_ids"].shape[1] :]
            if share.counted:
                answers = tokenizer.batch_decode(written, skip_special_tokens=True)
                found += zip(share.indices, answers, _until_end(written, config), strict=True)
    gathered = cast(list[list[tuple[int, str, list[int]]]], all_gather_objects(found))
    in_order = sorted(row for of_rank in gathered for row in of_rank)
    texts, token_ids = [text for _, text, _ in in_order], [ids for _, _, ids in in_order]
    return Generated(texts, sum(map(len, token_ids)), time.perf_counter() - begin, token_ids)


def _padded(prompts: Sequence[list[int]], pad_id: int, indices: list[int]) -> dict[str, Tensor]:
    ids, mask = pad_left([prompts[index] for index in indices], pad_id)
    return {"input_ids": ids, "attention_mask": mask}


def _until_end(written: Tensor, config: GenerationConfig) -> list[list[int]]:
    """Tokens of each row up to its first end, which is among them."""
    ends = torch.isin(written, torch.tensor(config.eos_token_id or [-1], device=written.device))
    before_end = (ends.cumsum(dim=1) - ends.long()) == 0
    lengths = before_end.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(written.tolist(), lengths, strict=True)]


@contextmanager
def _drawing_from(seed: int, device: torch.device, sample: bool) -> Iterator[None]:
    """Inside, the random states of the CPU and device start from seed; afterwards they are as before."""
    if not sample:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def generation_config(
    module: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, decoding: Decoding = GREEDY
) -> GenerationConfig:
    """Settings of a generation. An answer ends at the tokenizer's EOS or the model's own (chat models have several)."""
    own = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=0 if pad is None else pad,
        eos_token_id=sorted(ends) or None,
        num_beams=1,
        use_cache=True,
        **decoding.config(),
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
