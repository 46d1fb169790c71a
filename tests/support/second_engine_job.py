"""A job: compact mode at ZeRO-3, its engine evaluates after detach() and ends; then another engine trains the model.

Arguments: folder. Results for test_second_engine.py.
"""

import gc
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import z3_leaf_module, z3_leaf_parameter
from torch import nn

from piece_ds import attach, layout_of, prepare_compact, select
from support.engines import Setup, adamw, make_engine
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model

NUM_STEPS = 3


def main() -> None:
    start()
    results: Results = {}
    collect_case(results, "never-compact", lambda: {"losses": trained(frozen_embedding())})
    collect_case(results, "after-compact", after_compact)
    collect_case(results, "destroyed-first", destroyed_first)
    finish(results)


def after_compact() -> dict[str, Any]:
    model = frozen_embedding()
    whole = evaluated(model)
    prepare_compact(model, 0.05)
    engine = make_engine(model, Setup(3), adamw(model, lr=0.0, weight_decay=0.0))
    update = attach(engine, select(layout_of(engine.module), "random", 0.05))
    for batch in mine():
        engine.backward(engine(**batch).loss)
        engine.step()
    update.detach()
    seen = marked(model)
    found = evaluated(engine)
    engine.empty_partition_cache()
    engine.destroy()
    del engine, update
    gc.collect()
    left = marked(model) + sum(z3_leaf_parameter(param) for param in model.parameters())
    result = {"marked while it evaluates": seen, "left": left, "evaluated": found, "evaluated whole": whole}
    return {**result, "losses": trained(model)}


def destroyed_first() -> dict[str, Any]:
    """The update is taken off an engine that is gone already."""
    model = frozen_embedding()
    prepare_compact(model, 0.05)
    engine = make_engine(model, Setup(3), adamw(model, lr=0.0, weight_decay=0.0))
    update = attach(engine, select(layout_of(engine.module), "random", 0.05))
    engine.destroy()
    update.detach()
    return {"left": marked(model), "losses": trained(model)}


def frozen_embedding() -> nn.Module:
    """A model whose first layer's input needs no gradient: there DeepSpeed's hooks of a leaf module fail."""
    model = make_model("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def trained(model: nn.Module) -> list[float]:
    """Losses of this rank while all unfrozen weights train at ZeRO-3."""
    engine = make_engine(model, Setup(3), adamw(model))
    losses = []
    for batch in mine():
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def evaluated(model: Any) -> list[float]:
    model.eval()
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in mine()]
    model.train()
    return losses


def mine() -> list[dict[str, torch.Tensor]]:
    return make_micro_batches(num=2 * NUM_STEPS)[dist.get_rank() :: dist.get_world_size()]


def marked(model: nn.Module) -> int:
    return sum(z3_leaf_module(module) for module in model.modules())


if __name__ == "__main__":
    main()
