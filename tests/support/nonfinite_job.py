"""A job: steps with NaN in the gradient, on two ranks; results for test_nonfinite.py."""

import sys
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from piece_ds.update.attach import attach, prepare_compact
from piece_ds.zero.statistics import collect_statistics
from piece_ds.zero.step_watch import StepWatch
from piece_ds.zero.supported import adapter_for
from support.engines import adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model
from support.nonfinite_cases import CASES, FAST, Poisoned
from support.update_cases import ACCUMULATION, CLIP, FAMILY, NUM_RANKS, NUM_SELECTED, batches_of
from support.update_job import mask_of, step_scale_of


def main() -> None:
    start()
    results: Results = {}
    for name in sys.argv[2:]:
        case = CASES[name]
        collect_case(results, name, lambda case=case: run(case))  # type: ignore[misc]
    if sys.argv[2:] == list(FAST):
        collect_case(results, "statistics", statistics)
    finish(results)


def run(case: Poisoned) -> dict[str, Any]:
    """Weights, masters and moments around three steps, and what was found wrong with each."""
    model = make_model(FAMILY)
    if case.mode == "compact":
        prepare_compact(model, num_selected=NUM_SELECTED)
    engine = make_engine(model, case.setup, adamw(model), ACCUMULATION, CLIP)
    update = None
    if case.mode != "plain":
        step_scale = step_scale_of(engine) if case.scaled else None
        update = attach(engine, mask_of(engine), selected_gradient="dense", step_scale=step_scale)
    watch = update.watch if update is not None else StepWatch(adapter_for(engine))
    remove = [] if update is not None else watch.install()
    states, faults = [state_of(engine)], []
    for step in range(3):
        for number, batch in enumerate(batches_of(step)[dist.get_rank() :: NUM_RANKS]):
            loss = engine(**batch).loss
            is_last = dist.get_rank() == 1 and number == ACCUMULATION - 1
            engine.backward(loss * float("nan") if step == 1 and is_last and not case.overflows else loss)
            engine.step()
        found: list[Any] = [None] * dist.get_world_size()
        local = update.is_local_finite() if update is not None else None
        dist.all_gather_object(found, None if watch.fault is None else {**asdict(watch.fault), "local_finite": local})
        faults.append(found)
        states.append(state_of(engine))
    for function in remove:
        function()
    engine.destroy()
    return {"states": states, "faults": faults, "replicated": watch.replicated}


def state_of(engine: Any) -> dict[str, Tensor]:
    """Copies of all weights, whole, and of this rank's masters and moments."""
    optimizer = engine.basic_optimizer
    state = {f"weight {name}": values for name, values in whole_weights(engine).items()}
    for group in optimizer.param_groups:
        for number, master in enumerate(group["params"]):
            state[f"master {number}"] = master.detach().cpu().clone()
            moments = {key: value for key, value in optimizer.state.get(master, {}).items() if torch.is_tensor(value)}
            state |= {f"{key} {number}": value.cpu().clone() for key, value in moments.items()}
    return state


def statistics() -> dict[str, Any]:
    """Statistics of five micro-batches, the fourth of which has NaN in the gradients of two parameters."""
    from support.engines import Setup

    found = {}
    for stage in (3,):
        model = make_model(FAMILY)
        engine = make_engine(model, Setup(stage), adamw(model), ACCUMULATION, CLIP)
        batches = make_micro_batches(FAMILY, 5)
        poison = {"model.layers.1.mlp.down_proj.weight": 7, "model.layers.0.self_attn.k_proj.weight": 2}
        rounds = {"number": -1}

        def count(*_: Any, rounds: dict[str, int] = rounds) -> None:
            rounds["number"] += 1

        handles = [engine.module.register_forward_pre_hook(count)]
        for name, index in poison.items():
            param = engine.module.get_parameter(name)

            def spoil(grad: Tensor, index: int = index, rounds: dict[str, int] = rounds) -> Tensor:
                if rounds["number"] == 1 and dist.get_rank() == 1:  # micro-batch 3 is rank 1's second
                    grad = grad.clone()
                    grad.view(-1)[index] = float("nan")
                return grad

            handles.append(param.register_hook(spoil))
        stats = collect_statistics(engine, batches)
        found[stage] = {"count": stats.num_nonfinite, "first": stats.first_nonfinite}
        for handle in handles:
            handle.remove()
        engine.destroy()
    return found


if __name__ == "__main__":
    main()
