"""A job: baselines' terms and projections on real engines, for test_baseline_engines.py."""

from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist

from piece_ds.data.collate import Collator
from piece_ds.data.tasks import Task
from piece_ds.methods.baseline import TaskContext
from piece_ds.methods.ewc import penalty_gradient
from piece_ds.methods.gem import _Projection
from piece_ds.models.layout import layout_of
from piece_ds.runtime.distributed import all_reduce_sum_
from piece_ds.runtime.errors import UserError
from piece_ds.zero.gradient_term import GradientTerm, Ranges
from support.baseline_cases import (
    ACCUMULATION,
    CLIP,
    NUM_STEPS,
    SETUPS,
    WEIGHT,
    batches_of,
    fisher_of,
    make_optimizer,
)
from support.engines import Setup, make_engine, whole_masters, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import VOCAB, make_model

GEM_STAGES = {name: SETUPS[name] for name in ("stage0", "stage1-bf16", "stage2", "stage3")}


def main() -> None:
    start()
    results: Results = {}
    for name, setup in SETUPS.items():
        collect_case(results, name, lambda setup=setup: penalised(setup))  # type: ignore[misc]
    for name, setup in GEM_STAGES.items():
        collect_case(results, f"gem-{name}", lambda setup=setup: projected(setup))  # type: ignore[misc]
    collect_case(results, "offload", refused)
    finish(results)


def penalised(setup: Setup) -> dict[str, Any]:
    """Training with EWC's gradient, where F is made up and the anchor is the start."""
    model = make_model("llama")
    engine = make_engine(model, setup, make_optimizer(model), ACCUMULATION, CLIP)
    term, layout = GradientTerm(engine), layout_of(model)
    embedding = "model.embed_tokens.weight"  # has no statistics: its gradient gets no term below, so one by hand
    flat = torch.cat(
        [fisher_of(i.name, torch.Size(i.shape)).reshape(-1)[p.start : p.stop] for i, p, _ in layout.owned()]
    )
    fisher = term.ranges_of(layout, flat)
    anchor = {name: (start, w.clone()) for name, (start, w) in term.weights().items()}
    if embedding in anchor:
        first, values = anchor[embedding]
        shape = torch.Size(layout.shapes()[embedding])
        fisher[embedding] = first, fisher_of(embedding, shape).reshape(-1)[first : first + values.numel()]
    remove = term.install(lambda: term.add_(penalty_gradient(WEIGHT, fisher, term.weights(), anchor)))
    norms = []
    for step in range(NUM_STEPS):
        for batch in batches_of(step, dist.get_world_size())[dist.get_rank() :: dist.get_world_size()]:
            engine.backward(engine(**batch).loss * 1.0)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    remove()
    result = {"weights": whole_weights(engine), "masters": whole_masters(engine), "norms": norms}
    engine.destroy()
    return result


def projected(setup: Setup) -> dict[str, Any]:
    """One step of GEM: products of the gradient with each memory's, before and after, over all ranks."""
    model = make_model("llama")
    engine = make_engine(model, setup, make_optimizer(model))
    rows = make_rows()
    parts = {"a": range(4), "b": range(4, 8), "now": range(8, 12)}
    tasks = [Task(name, rows.select(part), rows, rows, [], []) for name, part in parts.items()]
    context = TaskContext(2, 3, tasks[2], tuple(tasks[:2]), Path(), None, Collator(0), 2, 0)
    acts = _Projection(context, [task.train for task in tasks[:2]], margin=0.0)
    acts.begin(engine)
    acts.before_step(engine)
    # The reduced gradient is made to point against both memories: a push along minus their sum.
    term = GradientTerm(engine)
    batch = Collator(0)([tasks[2].train[dist.get_rank()]])
    engine.backward(engine(**batch).loss * 1.0)
    term.add_(
        {
            name: (start, -3 * (values + acts.gradients_K[1][name][1]))
            for name, (start, values) in acts.gradients_K[0].items()
        }
    )
    before = products(term, acts.gradients_K)
    acts._project()
    after = products(term, acts.gradients_K)
    acts.end()
    engine.destroy()
    return {"before": before, "after": after, "num_hooks_left": "_take_model_step" in engine.__dict__}


def make_rows() -> datasets.Dataset:
    ids = [[1 + (7 * i + j) % (VOCAB - 1) for j in range(6)] for i in range(12)]
    labels = [[-100] + [1 + (5 * i + j) % 90 for j in range(5)] for i in range(12)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


def products(term: GradientTerm, memories: list[Ranges]) -> list[float]:
    current = term.gradients()
    found = []
    for memory in memories:
        dot = torch.stack([values.double() @ current[name][1].double() for name, (_, values) in memory.items()]).sum()
        norm = torch.stack([values.double() @ values.double() for _, values in memory.values()]).sum()
        pair = torch.stack([dot, norm])
        dot, norm = pair if term.replicated else all_reduce_sum_(pair)
        found.append(float(dot / norm))
    return found


def refused() -> dict[str, Any]:
    model = make_model("llama")
    engine = make_engine(model, Setup(2, offload="optimizer"), make_optimizer(model))
    try:
        GradientTerm(engine)
    except UserError as error:
        return {"message": str(error)}
    finally:
        engine.destroy()
    return {"message": None}


if __name__ == "__main__":
    main()
