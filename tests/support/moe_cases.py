"""The cases of training a mixture of experts, and what plain torch says each must give."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from support.engines import Setup
from support.models import make_micro_batches
from support.moe import EMBEDDING, FAMILIES, STACKED, force_routing, frozen_routers, make_moe
from support.oracle import Arrays, SelectedAdamW, gradient_sums, score

RATIO = 0.02
NUM_STEPS, ACCUMULATION, LEARNING_RATE, WEIGHT_DECAY, CLIP = 2, 2, 1e-2, 0.1, 0.5


@dataclass(frozen=True)
class Case:
    """One task on one engine.

    Attributes:
        family: of the model.
        setup: of DeepSpeed.
        mode: of the update.
        num_ranks: where it runs.
        sampled: gradients of selected weights are sampled where there is a formula.
        experts: how transformers multiplies: '' means its choice.
        aux_loss: the model's loss has the load-balancing term.
        eligible: what --eligible would say.
        checkpointing: '', 'reentrant' or 'non-reentrant'.
        bucket_elements: gradients exchanged at a time; 0 means the package's own.
        forced: all rows of a micro-batch go to one expert, another one on another rank.
        num_steps: of training.
    """

    family: str
    setup: Setup
    mode: str = "compact"
    num_ranks: tuple[int, ...] = (2,)
    sampled: bool = False
    experts: str | None = None
    aux_loss: bool = False
    eligible: str = ""
    checkpointing: str = ""
    bucket_elements: int = 0
    forced: bool = False
    num_steps: int = NUM_STEPS


CASES = {
    f"{family}-stage{stage}-{mode}": Case(family, Setup(stage), mode, (1, 2) if mode == "compact" else (2,))
    for family in FAMILIES
    for stage in (0, 2, 3)
    for mode in ("compact", "masked")
}
CASES |= {f"small-buckets-{f}-stage3": Case(f, Setup(3), "masked", bucket_elements=300) for f in (*STACKED, "listed")}
CASES |= {f"small-buckets-{f}-stage2": Case(f, Setup(2), bucket_elements=300) for f in ("mixtral", "listed")}
CASES |= {f"sampled-{f}-stage3": Case(f, Setup(3), sampled=True) for f in FAMILIES}
CASES |= {f"sampled-{f}-eager-stage2": Case(f, Setup(2), sampled=True, experts="eager") for f in STACKED}
CASES |= {
    f"{how}-checkpointing-{family}-stage3": Case(family, Setup(3), checkpointing=how, sampled=True)
    for how in ("reentrant", "non-reentrant")
    for family in ("qwen3-moe", "listed")
}
CASES |= {
    "aux-loss-mixtral-stage3": Case("mixtral", Setup(3), aux_loss=True),
    "aux-loss-qwen3-moe-stage2": Case("qwen3-moe", Setup(2), "masked", aux_loss=True),
    "aux-loss-gpt-oss-stage0": Case("gpt-oss", Setup(0), aux_loss=True),
    "routers-too-deepseek-v3-stage3": Case("deepseek-v3", Setup(3), eligible="*.gate.*"),
    "routers-too-gpt-oss-stage2": Case("gpt-oss", Setup(2), "masked", eligible="*.router.*"),
}
CASES |= {
    f"forced-{family}-stage{stage}-{mode}": Case(family, Setup(stage), mode, forced=True, bucket_elements=300)
    for family in ("mixtral", "listed")
    for stage in (0, 1, 2, 3)
    for mode in ("compact", "masked")
}
# What the fast tests run, as (case, ranks): every family, stage, mode, kind of bucket and of checkpointing once.
FAST = {
    ("mixtral-stage3-compact", 2),
    ("qwen3-moe-stage2-masked", 2),
    ("gpt-oss-stage3-masked", 2),
    ("deepseek-v3-stage0-compact", 2),
    ("listed-stage2-masked", 2),
    ("listed-stage3-compact", 2),
    ("small-buckets-mixtral-stage3", 2),
    ("small-buckets-listed-stage3", 2),
    ("sampled-gpt-oss-stage3", 2),
    ("reentrant-checkpointing-listed-stage3", 2),
    ("aux-loss-mixtral-stage3", 2),
    ("routers-too-gpt-oss-stage2", 2),
    ("forced-mixtral-stage3-compact", 2),
    ("forced-listed-stage1-masked", 2),
    ("forced-listed-stage2-compact", 2),
    ("forced-listed-stage3-masked", 2),
    ("deepseek-v3-stage3-compact", 1),
}
SLOW = {(name, ranks) for name, case in CASES.items() for ranks in case.num_ranks} - FAST

# Only that they end, and that nothing else moves.
LONG = {
    f"long-{family}-{mode}": Case(family, Setup(3), mode, forced=True, bucket_elements=300, num_steps=200)
    for family in ("mixtral", "gpt-oss", "listed")
    for mode in ("compact", "masked")
}

# What one job runs. The slow ones and the long ones would take a quarter of an hour together.
TIERS = {"fast": FAST}
TIERS |= {family: {(name, ranks) for name, ranks in SLOW if CASES[name].family == family} for family in FAMILIES}
TIERS |= {name: {(name, 2)} for name in LONG}


def task_batches(case: Case) -> list[dict[str, Tensor]]:
    return make_micro_batches("llama", 7)


def general_batches(case: Case) -> list[dict[str, Tensor]]:
    """Others than the task's."""
    return [{**b, "input_ids": b["input_ids"].flip(-1), "labels": b["labels"].flip(-1)} for b in make_micro_batches()]


@cache
def all_batches(num: int) -> list[dict[str, Tensor]]:
    return make_micro_batches("llama", num)


def batches_of_step(case: Case, step: int, rank: int, num_ranks: int) -> list[dict[str, Tensor]]:
    num = ACCUMULATION * num_ranks
    return all_batches(case.num_steps * num)[num * step + rank : num * (step + 1) : num_ranks]


def oracle_model(case: Case) -> torch.nn.Module:
    model = make_moe(case.family, aux_loss=case.aux_loss, experts=case.experts)
    if case.forced:
        force_routing(model)
    return model if case.eligible else frozen_routers(model)


@cache
def _sums(
    family: str, aux_loss: bool, eligible: str, experts: str | None, forced: bool
) -> tuple[Arrays, Arrays, Arrays, int]:
    case = Case(family, Setup(0), aux_loss=aux_loss, eligible=eligible, experts=experts, forced=forced)
    sums, squares = gradient_sums(oracle_model(case), task_batches(case), EMBEDDING)
    _, general = gradient_sums(oracle_model(case), general_batches(case), EMBEDDING)
    return sums, squares, general, sum(p.numel() for p in oracle_model(case).parameters())


def scores_of(case: Case) -> tuple[dict[str, Arrays], int]:
    """Scores by method, and k."""
    sums, squares, general, total = _sums(case.family, case.aux_loss, case.eligible, case.experts, case.forced)
    f = {name: array / len(task_batches(case)) for name, array in squares.items()}
    g = {name: array / len(general_batches(case)) for name, array in general.items()}
    every = np.sort(np.concatenate(list(g.values())))
    d = every[len(every) - 1 - len(every) // 2] or np.sort(every[every > 0])[(np.count_nonzero(every) - 1) // 2]
    ratio = {name: f[name] / (g[name] + d) for name in f}
    return {"piece-s": score("piece-s", sums, squares), "piece-ratio": ratio}, max(1, int(RATIO * total))


def plain_training(case: Case, index: dict[str, Tensor], num_ranks: int) -> dict[str, Tensor]:
    """The weights, flat, after the same steps of AdamW on nothing but the selected entries, in one process."""
    model = oracle_model(case)
    optimizer = SelectedAdamW(model, index, LEARNING_RATE, lambda name: WEIGHT_DECAY, CLIP)
    for step in range(case.num_steps):
        ranks = [batches_of_step(case, step, rank, num_ranks) for rank in range(num_ranks)]
        optimizer.step([batch for batches in ranks for batch in batches])
    return {name: param.detach().reshape(-1) for name, param in model.named_parameters()}
