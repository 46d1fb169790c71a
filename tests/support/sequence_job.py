"""A job: statistics and steps with Ulysses sequence parallelism, against plain torch; for test_sequence_parallel.py.

Arguments: folder, over how many ranks a row is spread, and names of cases; none means all of them.
"""

import sys
from functools import partial
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from piece_ds import attach, estimate_mask, prepare_compact
from piece_ds.runtime.errors import UserError
from piece_ds.zero.sequence_parallel import sequence_group, sequence_loss
from piece_ds.zero.statistics import collect_statistics
from support.engines import DTYPES, FP32_ACCUMULATION, Setup, adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import cast_parameters
from support.oracle import SelectedAdamW, gradient_sums, score, top_k
from support.selection_cases import as_set
from support.shapes import make_shape
from support.statistics_job import whole

VOCAB, ROWS, RATIO, NUM_BATCHES = 97, 2, 0.05, 5
ANY = Setup(2)
ACCUMULATION, NUM_STEPS, CLIP, LEARNING_RATE, WEIGHT_DECAY = 2, 2, 0.02, 1e-2, 0.1

CASES = {f"{family}-stage{stage}": (family, Setup(stage)) for family in ("llama", "qwen3") for stage in range(4)}
CASES |= {f"llama-bf16-stage{stage}": ("llama", Setup(stage, "bf16", config=FP32_ACCUMULATION)) for stage in (2, 3)}
CASES |= {"llama-stage3-offload": ("llama", Setup(3, offload="optimizer"))}


def main() -> None:
    start()
    size = int(sys.argv[2])
    mpu = UlyssesSPAttentionHF.register_with_transformers(
        make("llama"), "sdpa", sequence_parallel_size=size, micro_batch_size=ROWS, disable_in_eval=True
    )
    results: Results = {}
    initialize = partial(deepspeed.initialize, mpu=mpu)
    with mock.patch("deepspeed.initialize", initialize):
        for name in sys.argv[3:] or CASES:
            collect_case(results, name, lambda name=name: run_case(*CASES[name]))  # type: ignore[misc]
        for name, refusal in REFUSALS.items():
            collect_case(results, f"refusal-{name}", lambda refusal=refusal: refused(*refusal))  # type: ignore[misc]
    finish(results)


def make(family: str) -> nn.Module:
    """A tiny model whose heads can be dealt to 4 ranks."""
    torch.manual_seed(31)
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 45,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.2,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**sizes)).train()
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **sizes)).train()
    if family == "mistral":  # a window
        return MistralForCausalLM(MistralConfig(sliding_window=8, **sizes)).train()
    if family == "mamba":  # a state that goes from token to token
        return make_shape("mamba")
    assert family == "gptj"  # its attention is its own, not one of transformers' table
    config = GPTJConfig(vocab_size=VOCAB, n_embd=32, n_head=4, n_layer=2, rotary_dim=4, n_positions=64, resid_pdrop=0.0)
    config.initializer_range = 0.2
    return GPTJForCausalLM(config).train()


def batches(num: int) -> list[dict[str, Tensor]]:
    """Micro-batches of whole rows, padded on the right; one has a row less, and one no label in the first half."""
    generator = torch.Generator().manual_seed(8)
    found = []
    for b in range(num):
        length, padding = 9 + 2 * (b % 4), 1 + b % 3
        ids = torch.randint(1, VOCAB, (ROWS, length), generator=generator)
        attention = torch.ones_like(ids)
        attention[1, -padding:] = 0
        ids[1, -padding:] = 0
        labels = ids.masked_fill(attention == 0, -100)
        labels[:, : length // 2 + 1 if b == 1 else 2] = -100
        num_rows = 1 if b == 3 else ROWS
        found.append({k: v[:num_rows] for k, v in zip(NAMES, (ids, attention, labels), strict=True)})
    return found


NAMES = ("input_ids", "attention_mask", "labels")


def run_case(family: str, setup: Setup) -> dict[str, Any]:
    """How far statistics, mask, losses and steps of both modes are from those of whole rows in plain torch."""
    model = cast_parameters(make(family), DTYPES[setup.dtype]).eval()  # whole rows: see disable_in_eval
    embedding = "model.embed_tokens.weight"
    sums, squares = gradient_sums(model, batches(NUM_BATCHES), embedding)
    k = max(1, int(RATIO * sum(param.numel() for param in model.parameters())))
    expected = top_k(score("piece-s", sums, squares), k)
    result: dict[str, Any] = {"k": k}
    for mode in ("masked", "compact"):
        with mock.patch("piece_ds.update.gradients.max_density", return_value=1.0):
            found = run_mode(family, setup, mode)
        for which, want in (("sums", sums), ("squares", squares)):
            assert found[which].keys() == want.keys()
            errors = [abs(found[which][n] - want[n]).max() / (abs(want[n]).max() or 1.0) for n in want]
            result[f"{mode} {which}"] = float(max(errors))
        mask = as_set(found["index"])
        result[f"{mode} selected"], result[f"{mode} other"] = len(mask), len(mask - expected)
        result |= {f"{mode} {key}": value for key, value in compare(family, setup, found).items()}
    return result


def run_mode(family: str, setup: Setup, mode: str) -> dict[str, Any]:
    model = make(family)
    if mode == "compact":
        prepare_compact(model, RATIO)
    engine = make_engine(model, setup, adamw(model, LEARNING_RATE, WEIGHT_DECAY), ACCUMULATION, CLIP)
    initial = whole_weights(engine)
    stats = collect_statistics(engine, batches(NUM_BATCHES))
    mask = estimate_mask(engine, [], ratio=RATIO, layout=stats.layout, stats=stats)
    attach(engine, mask)
    losses, norms = [], []
    where = sequence_group(engine)
    for step in range(NUM_STEPS):
        for batch in step_batches(step, where.num_shards)[where.shard :: where.num_shards]:
            loss, mean = sequence_loss(engine, batch)
            losses.append(float(sum_over_ranks(mean) / dist.get_world_size()))
            engine.backward(loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    result = {"initial": initial, "final": whole_weights(engine), "index": mask.whole(), "norms": norms}
    result |= {"sums": whole(stats, "grad_sum"), "squares": whole(stats, "square_sum"), "losses": losses}
    result["num_shards"] = where.num_shards
    engine.destroy()
    return result


def sum_over_ranks(value: Tensor) -> Tensor:
    total = value.double()
    dist.all_reduce(total)
    return total


def step_batches(step: int, num_shards: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a step, over all groups of ranks."""
    per_step = ACCUMULATION * num_shards
    return batches(per_step * NUM_STEPS)[per_step * step : per_step * (step + 1)]


def compare(family: str, setup: Setup, found: dict[str, Any]) -> dict[str, Any]:
    """The steps of plain torch on whole rows and the same selection."""
    model = cast_parameters(make(family), DTYPES[setup.dtype]).eval()
    index = {name: positions.long() for name, positions in found["index"].items() if positions.numel()}
    optimizer = SelectedAdamW(model, index, LEARNING_RATE, lambda _: WEIGHT_DECAY, CLIP)
    norms, losses = [], []
    for step in range(NUM_STEPS):
        whole_rows = step_batches(step, found["num_shards"])
        with torch.no_grad():
            each = [float(model(**batch).loss) for batch in whole_rows]
        at_once = found["num_shards"]
        losses += [sum(each[a : a + at_once]) / at_once for a in range(0, len(each), at_once)]
        norms.append(optimizer.step(whole_rows))
    largest, moved, errors = 0.0, 0, []
    for name, param in model.named_parameters():
        before, after, want = found["initial"][name], found["final"][name], param.detach().reshape(-1)
        chosen = torch.zeros(before.numel(), dtype=torch.bool)
        chosen[index.get(name, torch.zeros(0).long())] = True
        moved += int((before != after)[~chosen].sum())
        if chosen.any():
            largest = max(largest, float((want - before)[chosen].abs().max()))
            errors.append((want - after)[chosen].abs())
    off = torch.cat(errors) / largest
    return {
        "moved": moved,
        "off": float(off.max()),
        "far": float((off > 0.5).float().mean()),
        "norm": max(abs(a - b) / b for a, b in zip(found["norms"], norms, strict=True)),
        "loss": max(abs(a - b) for a, b in zip(found["losses"], losses, strict=True)),
    }


def left_padded(rows: dict[str, Tensor]) -> None:
    rows["attention_mask"] = rows["attention_mask"].flip(1)


def labelled_padding(rows: dict[str, Tensor]) -> None:
    rows["labels"] = rows["input_ids"]


def small_ids(rows: dict[str, Tensor]) -> None:
    rows["input_ids"] = rows["input_ids"] % 60


def packed(rows: dict[str, Tensor]) -> None:
    length = rows["input_ids"].shape[1]
    rows["position_ids"] = torch.tensor([*range(4), *range(length - 4)]).expand_as(rows["input_ids"])


def with_images(rows: dict[str, Tensor]) -> None:
    rows["pixel_values"] = torch.zeros(ROWS, 3, 4, 4)


def more_rows(rows: dict[str, Tensor]) -> None:
    for key, value in rows.items():
        rows[key] = torch.cat([value, value])


def as_they_are(rows: dict[str, Tensor]) -> None:
    pass


# What is refused -> (family, what is done to the rows, setup of DeepSpeed).
REFUSALS: dict[str, tuple[Any, ...]] = {
    "left padding": ("llama", left_padded),
    "labels on padding": ("llama", labelled_padding),
    "packed rows": ("llama", packed),
    "images": ("llama", with_images),
    "more rows": ("llama", more_rows),
    "window": ("mistral", as_they_are),
    "attention of its own": ("gptj", as_they_are),
    "recurrence": ("mamba", small_ids),
    "bf16 optimizer": ("llama", as_they_are, Setup(1, "bf16", config=FP32_ACCUMULATION)),
    "bf16 at stage 0": ("llama", as_they_are, Setup(0, "bf16")),
    "all-reduce": ("llama", as_they_are, Setup(3, zero={"reduce_scatter": False})),
}


def refused(family: str, change: Any, setup: Setup = ANY) -> dict[str, Any]:
    """What the statistics pass says, and whether anything of the engine has changed."""
    model = make(family)
    engine = make_engine(model, setup, adamw(model))
    rows = batches(2)
    for row in rows:
        change(row)
    message = ""
    try:
        collect_statistics(engine, rows)
    except UserError as error:
        message = str(error)
    engine.destroy()
    return {"message": message}


if __name__ == "__main__":
    main()
