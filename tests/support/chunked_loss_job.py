"""A job: every gradient, and training, with the loss in chunks and with the model's own; for test_chunked_loss.py."""

import sys
from typing import Any

import torch
import torch.distributed as dist

from piece_ds import attach, estimate_mask, prepare_compact
from piece_ds.evaluation.chunked_loss import install_chunked_loss
from piece_ds.zero.statistics import collect_statistics
from support.engines import Setup, adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model
from support.statistics_job import whole
from support.update_cases import batches_of
from support.update_job import run_step

FAMILIES, STAGES, CHUNK = ("llama", "qwen3", "gemma2"), (0, 2, 3), 3


def main() -> None:
    start()
    results: Results = {}
    for stage in STAGES:
        for family in FAMILIES:
            collect_case(results, f"{family}-{stage}", lambda f=family, s=stage: gradients(f, s))  # type: ignore[misc]
        for mode in ("compact", "masked"):
            collect_case(results, f"{mode}-{stage}", lambda m=mode, s=stage: training(m, s))  # type: ignore[misc]
    finish(results)


def gradients(family: str, stage: int) -> dict[str, Any]:
    """The sums of every gradient over micro-batches whose answers make different numbers of chunks on each rank."""
    found = {}
    for chunk in (0, CHUNK):
        model = make_model(family)
        assert install_chunked_loss(model, chunk) == bool(chunk)
        engine = make_engine(model, Setup(stage), adamw(model))
        stats = collect_statistics(engine, make_micro_batches())
        found[chunk] = {which: whole(stats, which) for which in ("grad_sum", "square_sum")}
        engine.destroy()
    return found


def training(mode: str, stage: int) -> dict[str, Any]:
    """Three steps of two accumulated micro-batches, an untied head among the selected weights."""
    found: dict[str, Any] = {}
    for chunk in (0, CHUNK):
        model = make_model("llama")
        install_chunked_loss(model, chunk)
        if mode == "compact":
            prepare_compact(model, ratio=0.02)
        engine = make_engine(model, Setup(stage), adamw(model), accumulation=2, clip=0.02)
        before = whole_weights(engine)
        mask = estimate_mask(engine, make_micro_batches(), method="magnitude", ratio=0.02)
        assert "lm_head.weight" in mask.whole()
        update = attach(engine, mask)
        for step in range(3):
            run_step(engine, batches_of(step))
        update.detach()
        found[str(chunk)] = {name: value - before[name] for name, value in whole_weights(engine).items()}
        engine.destroy()
    assert dist.get_world_size() > 1
    assert all(torch.isfinite(change).all() for change in found["0"].values())
    return found


if __name__ == "__main__":
    main()
    sys.exit(0)
