"""A job: an engine that has trained with another mask, or with none, gets a mask; for test_second_mask.py."""

from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from piece_ds import Mask, attach, layout_of, prepare_compact, select
from piece_ds.runtime.errors import UserError
from support.engines import Setup, adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model

SETUPS = {"stage0": Setup(0), "stage2": Setup(2), "stage3-offload": Setup(3, offload="optimizer")}


def main() -> None:
    folder = start()
    results: Results = {}
    for name, setup in SETUPS.items():
        for first, is_detached in (("none", True), ("other", True), ("other", False), ("smaller", True)):
            case = partial(second_mask, setup, first, is_detached, is_compact=False)
            collect_case(results, f"{name} {first} {'detached' if is_detached else 'attached'}", case)
        for first in ("none", "other", "same"):
            collect_case(results, f"{name} {first} loaded", partial(loaded, setup, first, folder / f"{name}-{first}"))
    for is_detached in (True, False):
        case = partial(second_mask, Setup(2), "other", is_detached, is_compact=True)
        collect_case(results, f"compact other {'detached' if is_detached else 'attached'}", case)
    finish(results)


def second_mask(setup: Setup, first: str, is_detached: bool, is_compact: bool) -> dict[str, Any]:
    """What attach() says after two steps, or how many weights outside the mask two more steps move."""
    model = make_model("llama")
    if is_compact:
        prepare_compact(model, 0.05)
    engine = make_engine(model, setup, adamw(model))
    layout = layout_of(engine.module)
    wanted = select(layout, "random", 0.05)
    if first != "none":
        # A random mask of fewer weights is a part of one of more.
        update = attach(
            engine, wanted if is_compact else select(layout, "random", 0.02 if first == "smaller" else 0.08)
        )
    _train(engine)
    if first != "none" and is_detached:
        update.detach()
    try:
        attach(engine, wanted)
    except UserError as error:
        return {"refused": str(error)}
    return {"strays": _strays(engine, wanted)}


def loaded(setup: Setup, first: str, checkpoint: Path) -> dict[str, Any]:
    """What load_checkpoint() says in masked mode of steps without the mask, or how many other weights go on moving."""
    model = make_model("llama")
    engine = make_engine(model, setup, adamw(model))
    wanted = select(layout_of(engine.module), "random", 0.05)
    if first != "none":
        attach(engine, wanted if first == "same" else select(layout_of(engine.module), "random", 0.08))
    _train(engine)
    engine.save_checkpoint(str(checkpoint))

    model = make_model("llama")
    engine = make_engine(model, setup, adamw(model))
    update = attach(engine, wanted)
    try:
        engine.load_checkpoint(str(checkpoint))
    except UserError as error:
        return {"refused": str(error)}
    strays = _strays(engine, wanted)
    update.detach()
    return {"strays": strays, "left": "load_checkpoint" in vars(engine)}


def _strays(engine: Any, wanted: Mask) -> int:
    """How many weights outside the mask two more steps move."""
    before = whole_weights(engine)
    _train(engine)
    after, whole = whole_weights(engine), wanted.whole()
    moved = {name: (after[name] != before[name]).nonzero().view(-1).tolist() for name in before}
    selected = {name: set(whole[name].tolist()) if name in whole else set() for name in before}
    return sum(len(set(found) - selected[name]) for name, found in moved.items())


def _train(engine: Any) -> None:
    for batch in make_micro_batches(num=4)[dist.get_rank() :: dist.get_world_size()]:
        engine.backward(engine(**batch).loss)
        engine.step()


if __name__ == "__main__":
    main()
