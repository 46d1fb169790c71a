"""The base model: a small Llama and its tokenizer, trained here on general text, kept by a hash of recipe and text."""

import json
import math
import time
from collections import Counter
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.continual.material import Material, collect
from bench.continual.recipe import BaseRecipe, digest
from piece_ds.runtime.files import write_json, write_text

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
GENERAL_NAME = "general.jsonl"
GENERAL_CHARACTERS = 400
NUM_GENERAL_PIECES = 256
NUM_JUDGED_WINDOWS = 128


def make_base(cache: Path, recipe: BaseRecipe) -> Path:
    """Folder of the base model under cache, made when it is not there: transformers' files, general.jsonl, base.json.

    Raises:
        RuntimeError: see collect().
    Cost: at the default recipe 15 to 20 minutes of one core of a 2026 server.
    """
    material = collect(recipe)
    folder = cache / f"base-{digest(recipe, material.digest)}"
    if (folder / "base.json").is_file():
        return folder
    tokenizer = _train_tokenizer(material.learned, recipe)
    learned, held_out = (_token_stream(texts, tokenizer) for texts in (material.learned, material.held_out))
    model = _untrained(recipe)
    begin = time.perf_counter()
    _train_(model, learned, recipe)
    judged = _judge(model, learned, held_out, recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_text(folder / GENERAL_NAME, "".join(json.dumps({"text": t}) + "\n" for t in _pieces(material, recipe)))
    facts = {
        "parameters": model.num_parameters(),
        "tokens_of_material": len(learned),
        **judged,
        "train_seconds": round(time.perf_counter() - begin),
        "bytes": material.kind_bytes,
    }
    write_json(folder / "base.json", facts)
    return folder


def _train_tokenizer(texts: list[str], recipe: BaseRecipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; it adds no token around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        truncation_side="left",
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def _token_stream(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """All texts, each followed by EOS, int64."""
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, end)])


def _untrained(recipe: BaseRecipe) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            max_position_embeddings=2 * recipe.context,  # a row of the stream may be a little longer than a window
            initializer_range=recipe.hidden_size**-0.5,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def _windows(tokens: Tensor, starts: Tensor, context: int) -> Tensor:
    """BOS and context - 1 tokens from each start; int64 [starts, context]."""
    begin = torch.full((len(starts), 1), 1)
    return torch.cat([begin, tokens[starts.unsqueeze(1) + torch.arange(context - 1)]], dim=1)


def _train_(model: LlamaForCausalLM, tokens: Tensor, recipe: BaseRecipe) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(recipe.seed)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _share_of_rate(step, recipe)
        starts = torch.randint(len(tokens) - recipe.context, (recipe.rows,), generator=draw)
        ids = _windows(tokens, starts, recipe.context)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == recipe.steps - 1:
            print(f"base model: step {step + 1} of {recipe.steps}, loss {loss.item():.3f}", flush=True)


def _share_of_rate(step: int, recipe: BaseRecipe) -> float:
    """Linear warm-up, then a cosine down to a tenth."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def _judge(model: LlamaForCausalLM, learned: Tensor, held_out: Tensor, recipe: BaseRecipe) -> dict[str, float]:
    """Nats per token of held-out text: the model's, and those of the frequencies of single tokens."""
    starts = torch.linspace(0, len(held_out) - recipe.context, NUM_JUDGED_WINDOWS).long()
    losses = [
        model(input_ids=ids, labels=ids).loss.item() for ids in _windows(held_out, starts, recipe.context).split(16)
    ]
    counts = Counter(learned.tolist())
    total = len(learned) + recipe.vocab_size
    unigram = [math.log(total / (counts[token] + 1)) for token in held_out.tolist()]
    return {"held_out_loss": sum(losses) / len(losses), "unigram_loss": sum(unigram) / len(unigram)}


def _pieces(material: Material, recipe: BaseRecipe) -> list[str]:
    """Pieces of held-out files, from places that a seed decides; at most one of a file before every file had one."""
    random = Random(recipe.seed)
    texts = [text for text in material.held_out if len(text) >= 2 * GENERAL_CHARACTERS]
    order = [text for _ in range(-(-NUM_GENERAL_PIECES // len(texts))) for text in random.sample(texts, len(texts))]
    starts = (random.randrange(len(text) - GENERAL_CHARACTERS) for text in order)
    return [text[s : s + GENERAL_CHARACTERS] for text, s in zip(order, starts, strict=False)][:NUM_GENERAL_PIECES]
