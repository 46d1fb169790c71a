"""A job: statistics, selection and training of mixtures of experts; results for test_experts.py.

Arguments: folder, and which of the tiers.
"""

import sys
from typing import Any
from unittest import mock

import torch.distributed as dist

from piece_ds import attach, collect_statistics, estimate_mask, prepare_compact
from piece_ds.methods.estimate import select
from piece_ds.methods.request import SelectionOptions
from piece_ds.models.experts import gather_experts_whole
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible
from piece_ds.zero import statistics
from support.engines import adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.moe import force_routing, make_moe
from support.moe_cases import (
    ACCUMULATION,
    CASES,
    CLIP,
    LEARNING_RATE,
    LONG,
    RATIO,
    TIERS,
    WEIGHT_DECAY,
    Case,
    batches_of_step,
    general_batches,
    task_batches,
)


def main() -> None:
    start()
    results: Results = {}
    wanted = TIERS[sys.argv[2]]
    for name, case in (CASES | LONG).items():
        if (name, dist.get_world_size()) in wanted:
            collect_case(results, name, lambda case=case: run_case(case))  # type: ignore[misc]
    finish(results)


def run_case(case: Case) -> dict[str, Any]:
    """Both masks from one pass each over the task and the general rows, then steps with the first."""
    model = make_moe(case.family, aux_loss=case.aux_loss, experts=case.experts)
    if case.forced:
        force_routing(model)
    freeze_ineligible(model, patterns=[case.eligible] if case.eligible else [])
    if case.checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    if case.mode == "compact":
        prepare_compact(model, RATIO)
    else:
        gather_experts_whole(model)
    engine = make_engine(model, case.setup, adamw(model, LEARNING_RATE, WEIGHT_DECAY), ACCUMULATION, CLIP)
    initial = whole_weights(engine)

    # Selection.
    layout = layout_of(engine.module)
    with mock.patch.object(statistics, "BUCKET_ELEMENTS", case.bucket_elements or statistics.BUCKET_ELEMENTS):
        stats = collect_statistics(engine, task_batches(case), layout=layout)
        leftover = [name for name, param in model.named_parameters() if param.grad is not None]
        general = collect_statistics(engine, general_batches(case), needs_sum=False, layout=layout)
        options = SelectionOptions(general=lambda: general)
        by_ratio = estimate_mask(engine, task_batches(case), method="piece-ratio", ratio=RATIO, options=options)
    masks = {"piece-s": select(layout, "piece-s", RATIO, stats), "piece-ratio": by_ratio}

    # Steps.
    with mock.patch("piece_ds.update.gradients.max_density", return_value=1.0):
        update = attach(engine, masks["piece-s"], selected_gradient="auto" if case.sampled else "dense")
    collection = getattr(update, "_collection", None)
    for step in range(case.num_steps):
        for batch in batches_of_step(case, step, dist.get_rank(), dist.get_world_size()):
            engine.backward(engine(**batch).loss)
            engine.step()
    result = {
        "masks": {method: mask.whole() for method, mask in masks.items()},
        "initial": initial,
        "final": whole_weights(engine),
        "leftover": leftover,
        "sampled": [] if collection is None else [one.name for one in collection._sampled],
    }
    engine.destroy()
    return result


if __name__ == "__main__":
    main()
