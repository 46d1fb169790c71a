"""Generate answers to many prompts, greedy or sampled. The work is divided over ranks; every rank gets all answers."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from piece_ds.data.turn_end import turn_end_id
from piece_ds.evaluation.batches import evaluating, shard_batches
from piece_ds.evaluation.padding import answers_alone
from piece_ds.runtime.distributed import all_gather_objects, is_main, world_size
from piece_ds.runtime.progress import progress_bar
from piece_ds.runtime.signals import exit_if_signalled
from piece_ds.state.partition import is_partitioned

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    Attributes:
        sample: draw it at random; False takes the likeliest one.
        temperature, top_k, top_p: of sampling. The defaults are those of the method's authors.
        seed: of sampling. Every batch has a random state of its own, so texts do not depend on the number of ranks.
    """

    sample: bool = False
    temperature: float = 0.3
    top_k: int = 10
    top_p: float = 0.95
    seed: int = 42

    def config(self) -> dict[str, Any]:
        """Return the settings as GenerationConfig takes them."""
        if not self.sample:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


GREEDY = Decoding()


@dataclass(frozen=True)
class Generated:
    """Texts and what they cost.

    Attributes:
        texts: in the order of the prompts, without special tokens.
        num_tokens: tokens generated, with the end token of each text and without padding.
        seconds: wall time on this rank.
        token_ids: of each text, with its end token.
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
    """Generate an answer to each prompt; call it on every rank.

    Args:
        model: a causal model of transformers, or the DeepSpeed engine around one. Its training mode is restored.
        prompts: token ids of each prompt, at least one id each, the same on every rank.
        tokenizer: the model's. Its pad (or EOS) token pads on the left. Its EOS token ends an answer, and so do the end
            tokens in the model's own generation settings; nothing else of those is used.
        max_new_tokens: most tokens of an answer, >= 1.
        batch_size: prompts generated together. The longest come first, and similar lengths go together. If padding
            changes a model's answers, its prompts are answered one at a time.
        device: where the batches go.
        decoding: greedy or sampled.
        synced_gpus: whether every rank must keep making forward passes until the last one has finished; None means if
            the parameters are partitioned (ZeRO-3).
        description: of the progress bar.
        batch_of: indices of prompts -> the model's inputs, padded on the left; for inputs other than token ids. Rows
            after those asked for are ignored. The prompts' lengths then only decide what goes together.
    Returns:
        The same texts and number of tokens on every rank.
    Raises:
        ValueError: an empty prompt.
    Cost: prompts / (batch_size * ranks) rounds of up to max_new_tokens passes. Texts go through pickle once.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt to generate from needs at least one token id")

    # What is generated, and how.
    begin = time.perf_counter()
    module = getattr(model, "module", model)
    synced = is_partitioned(*module.parameters()) if synced_gpus is None else synced_gpus
    config = generation_config(module, tokenizer, max_new_tokens, decoding)
    found: list[tuple[int, str, list[int]]] = []
    lengths = [len(prompt) for prompt in prompts]
    inputs_of = batch_of or partial(_padded, prompts, cast(int, config.pad_token_id))

    # Generate this rank's share. Under ZeRO-3 a filler batch runs too, as its forward passes gather parameters.
    with evaluating(model), no_generation_defaults(module):
        if batch_size > 1 and answers_alone(module, lengths, inputs_of, config, device, synced and world_size() > 1):
            batch_size = 1
        shares = shard_batches(lengths, batch_size)
        for share in progress_bar(shares, description, unit="batch"):
            exit_if_signalled("during an evaluation")
            # Without partitioned parameters a filler batch would only cost time.
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

    # Give every rank all answers, in the order of the prompts.
    gathered = cast(list[list[tuple[int, str, list[int]]]], all_gather_objects(found))
    in_order = sorted(row for of_rank in gathered for row in of_rank)
    texts, token_ids = [text for _, text, _ in in_order], [ids for _, _, ids in in_order]
    return Generated(texts, sum(map(len, token_ids)), time.perf_counter() - begin, token_ids)


def _padded(prompts: Sequence[list[int]], pad_id: int, indices: list[int]) -> dict[str, Tensor]:
    ids, mask = pad_left([prompts[index] for index in indices], pad_id)
    return {"input_ids": ids, "attention_mask": mask}


def _until_end(written: Tensor, config: GenerationConfig) -> list[list[int]]:
    """Return the tokens of each row up to and including its first end token."""
    ends = torch.isin(written, torch.tensor(config.eos_token_id or [-1], device=written.device))
    before_end = (ends.cumsum(dim=1) - ends.long()) == 0
    lengths = before_end.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(written.tolist(), lengths, strict=True)]


@contextmanager
def _drawing_from(seed: int, device: torch.device, sample: bool) -> Iterator[None]:
    """Start the random states of CPU and device from seed inside; afterwards restore them."""
    if not sample:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        torch.manual_seed(seed)
        yield


def generation_config(
    module: nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, decoding: Decoding = GREEDY
) -> GenerationConfig:
    """Return the settings of a generation.

    An answer ends at the tokenizer's EOS, at any of the model's own end tokens, or at what ends an assistant's turn in
    the chat template. Chat models have several; a base model that learns a template does not name that one.
    """
    own = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    # Chat models end a turn and a text with different tokens: any of them ends an answer.
    ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
    turn_end = turn_end_id(tokenizer)
    if turn_end is not None and turn_end not in ends:
        _say_unnamed_end(str(tokenizer.convert_ids_to_tokens(turn_end)))
        ends.add(turn_end)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=0 if pad is None else pad,
        eos_token_id=sorted(ends) or None,
        num_beams=1,
        use_cache=True,
        **decoding.config(),
    )


@lru_cache
def _say_unnamed_end(token: str) -> None:
    """Log, once a token, that other programs will not stop where the chat template's turns end."""
    if is_main():
        logger.warning(
            "answers end at %r, the end of a turn in the chat template; generation_config.json does not name it: "
            "add its id to eos_token_id there for other programs to stop at it",
            token,
        )


@contextmanager
def no_generation_defaults(module: nn.Module) -> Iterator[None]:
    """Hide the model's own generation settings from generate() inside.

    generate() would fill in ours with them. Some models' files set a repetition penalty of 1.05, which changes greedy
    answers.
    """
    kept = module.generation_config
    module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        module.generation_config = kept


def pad_left(prompts: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return (input_ids, attention_mask), int64, (prompts, longest), padded on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
