"""The cases of masked training on two ranks, and the plain optimizer that each must equal."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.engines import DTYPES, FP32_ACCUMULATION, Setup
from support.models import cast_parameters, embedding_name, make_micro_batches, make_model
from support.oracle import SelectedAdamW, step_factors
from support.statistics_cases import OFFLOADS

NUM_RANKS, ACCUMULATION, NUM_STEPS, LEARNING_RATE, WEIGHT_DECAY = 2, 2, 4, 1e-2, 0.1
CLIP = 0.02  # far below the norm: always active
FAMILY = "llama"


@dataclass(frozen=True)
class Case:
    """Four masked steps.

    two_groups: vectors in a second optimizer group, without decay. freeze: the embeddings. scaled: steps by general
    importance.
    """

    setup: Setup
    two_groups: bool = False
    freeze: bool = False
    scaled: bool = False


def config(stage: int, dtype: str = "fp32", offload: str = "", **zero: Any) -> Setup:
    return Setup(stage, dtype, offload, zero, FP32_ACCUMULATION if dtype == "bf16" and stage else {})


FP32 = {f"stage{s}": Case(Setup(s)) for s in range(4)} | {name: Case(setup) for name, setup in OFFLOADS.items()}
FP32 |= {
    "stage2-round-robin": Case(config(2, round_robin_gradients=True)),
    "stage2-offload-round-robin": Case(config(2, offload="optimizer", round_robin_gradients=True)),
    "stage2-not-contiguous": Case(config(2, contiguous_gradients=False)),
    "stage2-all-reduce": Case(config(2, reduce_scatter=False)),
    "stage1-all-reduce": Case(config(1, reduce_scatter=False)),
    "stage2-overlap": Case(config(2, overlap_comm=True, reduce_bucket_size=3000)),
    "stage3-overlap": Case(config(3, overlap_comm=True, reduce_bucket_size=3000)),
    "stage3-sub-groups": Case(config(3, sub_group_size=2000)),
    "stage3-offload-sub-groups": Case(config(3, offload="optimizer", sub_group_size=2000)),
    "stage3-nothing-persistent": Case(config(3, stage3_param_persistence_threshold=0)),
    "stage3-hpz": Case(config(3, zero_hpz_partition_size=2)),
    "stage3-frozen-embedding": Case(config(3), freeze=True),
    "stage2-frozen-embedding": Case(config(2), freeze=True),
}
FP32 |= {f"stage{s}-two-groups": Case(Setup(s), two_groups=True) for s in range(4)}
FP32 |= {"stage3-offload-two-groups": Case(Setup(3, offload="optimizer"), two_groups=True)}

BF16 = {
    f"bf16-{name}": Case(Setup(c.setup.stage, "bf16", c.setup.offload))
    for name, c in FP32.items()
    if name in ("stage0", "stage1", "stage2", "stage3", *OFFLOADS)
}
BF16_EXACT = {
    "bf16-stage1-bf16-optimizer": Case(config(1, "bf16")),
    "bf16-stage1-bf16-optimizer-two-groups": Case(config(1, "bf16"), two_groups=True),
    "bf16-stage2-fp32-accumulation": Case(config(2, "bf16")),
    "bf16-stage3-fp32-accumulation": Case(config(3, "bf16")),
    "bf16-stage3-offload-fp32-accumulation": Case(config(3, "bf16", "optimizer")),
}
FP16 = {f"fp16-stage{s}": Case(Setup(s, "fp16")) for s in (1, 2, 3)}
FP16 |= {f"fp16-stage{s}-offload": Case(Setup(s, "fp16", "optimizer")) for s in (2, 3)}
_OVERFLOW = {"fp16": {"enabled": True, "initial_scale_power": 19, "hysteresis": 1}}
OVERFLOW = {f"fp16-stage{s}-overflow": Case(Setup(s, "fp16", config=_OVERFLOW)) for s in (1, 2, 3)}
for _cases in (FP32, BF16, BF16_EXACT, OVERFLOW):
    _cases |= {
        f"{name}-scaled": replace(case, scaled=True)
        for name, case in list(_cases.items())
        if name
        in (
            "stage0",
            "stage2",
            "stage2-two-groups",
            "stage3-sub-groups",
            "stage3-offload-sub-groups",
            "bf16-stage0",
            "bf16-stage1-bf16-optimizer",
            "bf16-stage2-fp32-accumulation",
            "bf16-stage3-fp32-accumulation",
            "bf16-stage3-offload-fp32-accumulation",
            "fp16-stage2-overflow",
        )
    }
CASES = FP32 | BF16 | BF16_EXACT | FP16 | OVERFLOW


def batches_of(step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of one step; rank r takes the a-th of its share at a * NUM_RANKS + r."""
    per_step = NUM_RANKS * ACCUMULATION
    return make_micro_batches(FAMILY, per_step * NUM_STEPS)[per_step * step : per_step * (step + 1)]


@cache
def selection() -> dict[str, Tensor]:
    """Flat positions of a random 5 % of the eligible elements, with tensors and a whole layer kind left out."""
    rng = np.random.default_rng(9)
    index = {}
    for name, param in make_model(FAMILY).named_parameters():
        if name == embedding_name(FAMILY) or "up_proj" in name or name == "model.layers.1.input_layernorm.weight":
            continue
        chosen = np.flatnonzero(rng.random(param.numel()) < 0.05)
        if chosen.size:
            index[name] = torch.from_numpy(chosen)
    return index


NUM_SELECTED = sum(index.numel() for index in selection().values())


def decay_of(case: Case, num_dimensions: int) -> float:
    return 0.0 if case.two_groups and num_dimensions < 2 else WEIGHT_DECAY


@cache
def general_squares() -> dict[str, np.ndarray]:
    """Made-up sums of squares of general text, over NUM_GENERAL micro-batches: five decades, and some zeros."""
    rng = np.random.default_rng(3)
    found = {}
    for name, param in make_model(FAMILY).named_parameters():
        if name != embedding_name(FAMILY):
            values = np.exp(rng.normal(size=param.numel()) * 2.0).astype(np.float32)
            values[rng.random(param.numel()) < 0.1] = 0.0
            found[name] = values
    return found


NUM_GENERAL = 4


@cache
def factors() -> dict[str, Tensor]:
    """The factor of every element, by the oracle; embeddings, of which nothing is known, keep 1."""
    found = step_factors({name: values.astype(np.float64) / NUM_GENERAL for name, values in general_squares().items()})
    embedding = make_model(FAMILY).get_parameter(embedding_name(FAMILY))
    return found | {embedding_name(FAMILY): torch.ones(embedding.numel())}


@cache
def plain_run(dtype: str, two_groups: bool, scaled: bool = False) -> tuple[dict[str, Tensor], list[float]]:
    """(weights after the steps, norm of every step's masked gradient) of an optimizer of the selected entries alone."""
    return _plain_run(dtype, two_groups, selection(), scaled)


@cache
def plain_dense_run(dtype: str) -> tuple[dict[str, Tensor], list[float]]:
    """The same of every entry of the model, with scaled steps."""
    params = make_model(FAMILY).named_parameters()
    return _plain_run(dtype, False, {name: torch.arange(param.numel()) for name, param in params}, True)


def _plain_run(
    dtype: str, two_groups: bool, index: dict[str, Tensor], scaled: bool
) -> tuple[dict[str, Tensor], list[float]]:
    model = cast_parameters(make_model(FAMILY), DTYPES[dtype])
    dimensions = {name: param.dim() for name, param in model.named_parameters()}
    case = Case(Setup(0), two_groups)
    scale = factors() if scaled else None
    optimizer = SelectedAdamW(model, index, LEARNING_RATE, lambda n: decay_of(case, dimensions[n]), CLIP, scale)
    norms = [optimizer.step(batches_of(step)) for step in range(NUM_STEPS)]
    return {name: param.detach().reshape(-1) for name, param in model.named_parameters()}, norms


# Every weight trains, with scaled steps.
DENSE = {
    name: FP32[f"{name}-scaled"] for name in ("stage0", "stage2", "stage3-sub-groups", "stage3-offload-sub-groups")
}
DENSE |= {
    name: BF16_EXACT[f"{name}-scaled"]
    for name in ("bf16-stage1-bf16-optimizer", "bf16-stage2-fp32-accumulation", "bf16-stage3-fp32-accumulation")
}
