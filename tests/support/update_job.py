"""A job: masked training, refusals, and training after a statistics pass; results for test_masked_update.py.

Arguments: folder, and slow for the engines that only make test-all runs.
"""

import random
import sys
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible
from piece_ds.state.mask import Mask
from piece_ds.state.selected_values import selected_values
from piece_ds.state.statistics import empty_stats
from piece_ds.update.attach import attach, prepare_compact
from piece_ds.update.step_scale import StepScale, general_step_scale, scale_steps
from piece_ds.zero.statistics import collect_statistics
from support.engines import Setup, adamw, make_engine, whole_masters, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model
from support.undisturbed_cases import UNDISTURBED
from support.update_cases import (
    ACCUMULATION,
    CASES,
    CLIP,
    DENSE,
    FAMILY,
    LEARNING_RATE,
    NUM_GENERAL,
    NUM_RANKS,
    NUM_SELECTED,
    NUM_STEPS,
    WEIGHT_DECAY,
    Case,
    batches_of,
    decay_of,
    general_squares,
    selection,
)
from support.update_tiers import SLOW


def main() -> None:
    start()
    results: Results = {}
    is_slow = "slow" in sys.argv
    for name, case in CASES.items():
        if (name in SLOW) == is_slow:
            collect_case(results, name, lambda case=case: train(case))  # type: ignore[misc]
    for name, setup in UNDISTURBED.items():
        if (f"undisturbed-{name}" in SLOW) == is_slow:
            collect_case(results, f"undisturbed-{name}", lambda setup=setup: train_with_and_without_pass(setup))  # type: ignore[misc]
    if not is_slow:
        for name, case in DENSE.items():
            collect_case(results, f"dense-{name}", lambda case=case: train_dense(case))  # type: ignore[misc]
        collect_case(results, "detach", train_after_detach)
        for name, refusal in REFUSALS.items():
            collect_case(results, f"refusal-{name}", lambda refusal=refusal: refuse(*refusal))  # type: ignore[misc]
    finish(results)


def train(case: Case, compact: bool = False) -> dict[str, Any]:
    """Four steps with the selection; compact: DeepSpeed optimises the selected values alone."""
    model = make_model(FAMILY)
    if case.freeze:
        freeze_ineligible(model)
    if compact:
        decays = [name for name, param in model.named_parameters() if decay_of(case, param.dim())]
        prepare_compact(model, num_selected=NUM_SELECTED, decays=decays)
    engine = make_engine(model, case.setup, optimizer_of(model, case), ACCUMULATION, CLIP)
    initial = whole_weights(engine)
    mask = mask_of(engine)
    attach(engine, mask, selected_gradient="dense", step_scale=step_scale_of(engine) if case.scaled else None)
    masters = whole_masters(engine)
    result: dict[str, Any] = {"initial": initial, "initial_masters": masters, "norms": [], "after_first": None}
    for step in range(NUM_STEPS):
        run_step(engine, batches_of(step))
        norm = engine.get_global_grad_norm()
        result["norms"].append(None if norm is None else float(norm))
        result["after_first"] = result["after_first"] or whole_weights(engine)
    result |= {
        "final": whole_weights(engine),
        "final_masters": whole_masters(engine),
        "skipped_steps": engine.skipped_steps,
        "decays": [group["weight_decay"] for group in engine.basic_optimizer.param_groups],
        "wrapper": type(engine.optimizer).__name__,
    }
    engine.destroy()
    return result


def train_dense(case: Case) -> dict[str, Any]:
    """Four steps of every weight, scaled by general importance."""
    model = make_model(FAMILY)
    engine = make_engine(model, case.setup, optimizer_of(model, case), ACCUMULATION, CLIP)
    initial = whole_weights(engine)
    steps = scale_steps(engine, step_scale_of(engine))
    norms = []
    for step in range(NUM_STEPS):
        run_step(engine, batches_of(step))
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    steps.detach()
    decays = [group["weight_decay"] for group in engine.basic_optimizer.param_groups]
    result = {"initial": initial, "final": whole_weights(engine), "norms": norms, "decays": decays}
    engine.destroy()
    return result


def step_scale_of(engine: Any) -> StepScale:
    """From this rank's share of the made-up general statistics."""
    layout = layout_of(engine.module)
    stats = empty_stats(layout, False, "cpu")
    stats.num_micro_batches = NUM_GENERAL
    for info, part, offset in layout.owned():
        if info.name in general_squares():
            own = torch.from_numpy(general_squares()[info.name])[part.start : part.stop]
            stats.square_sum[offset : offset + part.numel] = own
    return general_step_scale(stats)


def optimizer_of(model: torch.nn.Module, case: Case) -> torch.optim.Optimizer:
    if not case.two_groups or selected_values(model):
        return adamw(model, LEARNING_RATE, WEIGHT_DECAY)
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def mask_of(engine: Any) -> Mask:
    """This rank's share of the selection, made by hand."""
    layout = layout_of(engine.module)
    index = {}
    for info in layout.parameters:
        chunk = -(-info.numel // dist.get_world_size())
        low, high = chunk * dist.get_rank(), chunk * (dist.get_rank() + 1)
        positions = selection().get(info.name, torch.zeros(0).long())
        positions = positions[(positions >= low) & (positions < high)]
        if positions.numel():
            index[info.name] = positions
    return Mask(layout, index, NUM_SELECTED)


def run_step(engine: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    """One optimizer step: this rank's share of the micro-batches."""
    for batch in batches[dist.get_rank() :: NUM_RANKS]:
        engine.backward(engine(**batch).loss)
        engine.step()


def train_with_and_without_pass(setup: Setup) -> dict[str, Any]:
    """Three steps with dropout; once with a statistics pass after the first. Seeded at the start alone."""
    outcomes = []
    for with_pass in (False, True):
        model = make_model(FAMILY, dropout=0.3)
        engine = make_engine(model, setup, adamw(model), ACCUMULATION, CLIP)
        torch.manual_seed(1 + dist.get_rank())
        random.seed(1)
        norms = []
        for step in range(3):
            if with_pass and step == 1:
                collect_statistics(engine, make_micro_batches(FAMILY, 5))
            run_step(engine, batches_of(step))
            norm = engine.get_global_grad_norm()
            norms.append(None if norm is None else float(norm))
        outcomes.append({"weights": whole_weights(engine), "masters": whole_masters(engine), "norms": norms})
        engine.destroy()
    return {"without": outcomes[0], "with": outcomes[1]}


def train_after_detach() -> dict[str, Any]:
    """After detach() everything trains again."""
    moved = {}
    for stage, offload in ((0, ""), (2, ""), (3, ""), (3, "optimizer")):
        model = make_model(FAMILY)
        engine = make_engine(model, Setup(stage, offload=offload), adamw(model), ACCUMULATION, CLIP)
        attach(engine, mask_of(engine)).detach()
        before = whole_weights(engine)
        run_step(engine, batches_of(0))
        after = whole_weights(engine)
        unselected = [name for name in before if name not in selection()]
        moved[f"stage{stage}{offload}"] = sum(int((before[n] != after[n]).sum()) for n in unselected)
        engine.destroy()
    return moved


def refuse(setup: Setup, optimizer: Any, forge: Any) -> dict[str, Any]:
    """What attach() raises on an engine; forge changes its configuration where this machine cannot build it so."""
    model = make_model(FAMILY)
    engine = make_engine(model, setup, optimizer(model.parameters()))
    forge(engine)
    try:
        attach(engine, mask_of(engine))
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    finally:
        with suppress(Exception):
            engine.destroy()
    return {"type": None, "message": ""}


def keep(engine: Any) -> None:
    pass


def forged(path: str, value: Any) -> Any:
    def forge(engine: Any) -> None:
        *parents, last = path.split(".")
        target = engine
        for name in parents:
            target = getattr(target, name)
        target.__dict__[last] = value

    return forge


ADAMW = lambda params: torch.optim.AdamW(params, lr=1e-3)  # noqa: E731


def as_engine(name: str) -> Any:
    """An engine of another class of DeepSpeed."""

    def forge(engine: Any) -> None:
        engine.__class__ = type(name, (type(engine),), {})

    return forge


def told(**zero: Any) -> Any:
    """An engine that was configured as this machine cannot build it."""
    return forged("_config._param_dict", {"zero_optimization": zero})


REFUSALS = {
    "sgd": (Setup(2), lambda params: torch.optim.SGD(params, lr=0.1), keep),
    "momentum": (Setup(3), lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), keep),
    "rmsprop": (Setup(0), lambda params: torch.optim.RMSprop(params), keep),
    "l2-decay": (Setup(2), lambda params: torch.optim.Adam(params, weight_decay=0.1), keep),
    "fp16-stage0": (Setup(0, "fp16"), ADAMW, keep),
    "zenflow": (Setup(2), ADAMW, told(zenflow={"topk_ratio": 0.1})),
    "nvme": (Setup(3), ADAMW, told(offload_optimizer={"device": "nvme"})),
    "super-offload": (Setup(3), ADAMW, told(offload_optimizer={"device": "cpu", "super_offload": True})),
    "ratio": (Setup(3), ADAMW, told(offload_optimizer={"device": "cpu", "ratio": 0.5})),
    "quantized-gradients": (Setup(3), ADAMW, told(zero_quantized_gradients=True)),
    "moe": (Setup(2), ADAMW, forged("has_moe_layers", True)),
    "predivided": (Setup(0, config={"prescale_gradients": True}), ADAMW, keep),
    "summed": (Setup(2, config={"gradient_allreduce_op": "sum"}), ADAMW, keep),
    "masters": (
        Setup(2, "bf16"),
        ADAMW,
        forged("_config._param_dict", {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}),
    ),
    "expert-parallel": (Setup(2), ADAMW, forged("_config._param_dict", {"expert_parallel": {"enabled": True}})),
    "pipeline": (Setup(1), ADAMW, as_engine("PipelineEngine")),
    "hybrid": (Setup(2), ADAMW, as_engine("DeepSpeedHybridEngine")),
}


if __name__ == "__main__":
    main()
