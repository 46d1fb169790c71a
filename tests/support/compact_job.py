"""A job: compact training, resuming and refusals; results for test_compact_update.py.

Arguments: folder, and the tier: fast or slow.
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from piece_ds import attach, collect_statistics, estimate_mask, prepare_compact
from piece_ds.models.loading import freeze_ineligible
from support.compact_cases import (
    EVERYWHERE,
    FAST,
    FAST_FULL,
    FAST_RESUMED,
    FAST_SAMPLED,
    FAST_WHOLE,
    FULL,
    RATIO,
    RESUMED,
    WHOLE,
    Whole,
)
from support.engines import Setup, adamw, make_engine, whole_masters, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model
from support.update_cases import (
    ACCUMULATION,
    CASES,
    CLIP,
    FAMILY,
    LEARNING_RATE,
    NUM_SELECTED,
    WEIGHT_DECAY,
    batches_of,
)
from support.update_job import mask_of, run_step, step_scale_of, train


def main() -> None:
    folder = start()
    results: Results = {}
    wanted = chosen(sys.argv[2], dist.get_world_size())
    for name, case in cases(folder).items():
        if name in wanted:
            collect_case(results, name, case)
    finish(results)


def chosen(tier: str, num_ranks: int) -> set[str]:
    """Names of the cases of a tier, 'fast' or 'slow'."""
    if num_ranks != 2:
        return {f"{kind}-{name}" for kind in ("whole", "sampled") for name in EVERYWHERE}
    fast = FAST | {f"whole-{name}" for name in FAST_WHOLE} | {f"resumed-{name}" for name in FAST_RESUMED}
    fast |= {f"sampled-{name}" for name in FAST_SAMPLED}
    fast |= {f"full-{name}" for name in FAST_FULL} | {f"refusal-{name}" for name in REFUSALS}
    return fast if tier == "fast" else cases(Path()).keys() - fast


def cases(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every case by name; those that write do so below folder."""
    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(train, c, compact=True) for name, c in CASES.items()
    }
    found |= {f"whole-{name}": partial(both_modes, whole) for name, whole in WHOLE.items()}
    found |= {f"sampled-{name}": partial(sampled, whole) for name, whole in WHOLE.items()}
    found |= {f"resumed-{name}": partial(resume, folder / name, setup) for name, setup in RESUMED.items()}
    found |= {f"full-{name}": partial(resume_full, folder / f"full-{name}", RESUMED[name]) for name in FULL}
    found |= {f"refusal-{name}": partial(refused, refusal, folder / name) for name, refusal in REFUSALS.items()}
    return found


def sampled(case: Whole) -> dict[str, Any]:
    """both_modes() with sampled gradients in every linear layer, although tiny ones have many selected weights."""
    with mock.patch("piece_ds.update.gradients.max_density", return_value=1.0):
        return both_modes(case, "auto")


def both_modes(case: Whole, selected_gradient: str = "dense") -> dict[str, Any]:
    """Statistics, selection and three steps on one engine, compact and masked."""
    result: dict[str, Any] = {}
    for mode in ("compact", "masked"):
        model = make_model(case.family)
        start = {name: param.requires_grad for name, param in model.named_parameters()}
        if case.checkpointing:
            model.config.use_cache = False
            model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
            freeze_ineligible(model)
            start = {name: param.requires_grad for name, param in model.named_parameters()}
        if mode == "compact":
            prepare_compact(model, case.ratio, unit=case.unit)
        engine = make_engine(model, case.setup, adamw(model, LEARNING_RATE, WEIGHT_DECAY), ACCUMULATION, CLIP)
        initial = whole_weights(engine)
        mask = estimate_mask(engine, make_micro_batches(case.family), ratio=case.ratio, unit=case.unit)
        update = attach(engine, mask, selected_gradient=selected_gradient)
        collection = getattr(update, "_collection", None)
        by_formula = [] if collection is None else [gradient.name for gradient in collection._sampled]
        optimised = sum(p.numel() for group in engine.basic_optimizer.param_groups for p in group["params"])
        norms = []
        for step in range(3):
            for batch in batches_for(case.family, step):
                engine.backward(engine(**batch).loss)
                engine.step()
            norms.append(float(engine.get_global_grad_norm()))
        leftover = [name for name, param in model.named_parameters() if param.grad is not None]
        update.detach()
        result[mode] = {
            "initial": initial,
            "final": whole_weights(engine),
            "index": mask.whole(),
            "norms": norms,
            "optimised": optimised,
            "by_formula": by_formula,
            "leftover": leftover,
            "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()} == start,
        }
        engine.destroy()
    return result


def batches_for(family: str, step: int) -> list[dict[str, torch.Tensor]]:
    """This rank's two micro-batches of a step; every rank has others."""
    num = ACCUMULATION * dist.get_world_size()
    return make_micro_batches(family, 3 * num)[num * step + dist.get_rank() : num * (step + 1) : dist.get_world_size()]


def compact_engine(setup: Setup, change: Callable[[nn.Module], None] | None = None) -> Any:
    model = make_model(FAMILY)
    if change is not None:
        change(model)
    prepare_compact(model, num_selected=NUM_SELECTED)
    return make_engine(model, setup, adamw(model, LEARNING_RATE, WEIGHT_DECAY), ACCUMULATION, CLIP)


def outcome(engine: Any, last: bool = True) -> dict[str, Any]:
    """Two steps; what they leave. last: the engine is not needed any more."""
    norms = []
    for step in (2, 3):
        run_step(engine, batches_of(step))
        norms.append(float(engine.get_global_grad_norm()))
    result = {"weights": whole_weights(engine), "masters": whole_masters(engine), "norms": norms}
    if last:
        engine.destroy()
    return result


def attach_to(engine: Any, save_full: bool = False, scaled: bool = False) -> None:
    attach(engine, mask_of(engine), save_full, step_scale=step_scale_of(engine) if scaled else None)


def saved(folder: Path, setup: Setup, save_full: bool = False, scaled: bool = False) -> Any:
    """An engine after two steps and a checkpoint."""
    engine = compact_engine(setup)
    attach_to(engine, save_full, scaled)
    for step in (0, 1):
        run_step(engine, batches_of(step))
    engine.save_checkpoint(str(folder))
    return engine


def resume(folder: Path, setup: Setup) -> dict[str, Any]:
    """Uninterrupted; the checkpoint loaded again into that engine; attached before it is loaded; attached after."""
    scaled = folder.name.endswith("-scaled")
    engine = saved(folder, setup, scaled=scaled)
    result = {"uninterrupted": outcome(engine, last=False)}
    engine.load_checkpoint(str(folder))
    result["loaded again"] = outcome(engine)
    engine = compact_engine(setup)
    attach_to(engine, scaled=scaled)
    engine.load_checkpoint(str(folder))
    result["attached, then loaded"] = outcome(engine)
    engine = compact_engine(setup)
    engine.load_checkpoint(str(folder))
    attach_to(engine, scaled=scaled)
    result["loaded, then attached"] = outcome(engine)
    largest = max(
        (
            tensor.numel()
            for path in folder.rglob("*_states.pt")
            for tensor in tensors_in(torch.load(path, weights_only=False))
        ),
        default=0,
    )
    return {**result, "largest": largest}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for child in children for tensor in tensors_in(child)]


def resume_full(folder: Path, setup: Setup) -> dict[str, Any]:
    """A whole checkpoint needs nothing of the model that it is loaded into."""
    result = {"uninterrupted": outcome(saved(folder, setup, save_full=True))}
    engine = compact_engine(setup, halve)
    attach(engine, mask_of(engine))
    engine.load_checkpoint(str(folder))
    result["into another model"] = outcome(engine)
    return result


def halve(model: nn.Module) -> None:
    for param in model.parameters():
        param.data.mul_(0.5)


def nudge(model: nn.Module) -> None:
    """One bit of one weight that is not selected."""
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data.view(torch.int32).view(-1)[17] ^= 1


def refused(refusal: Callable[[Path], None], folder: Path) -> dict[str, Any]:
    try:
        refusal(folder)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": None, "message": ""}


def resume_with_another_base(folder: Path) -> None:
    saved(folder, Setup(3)).destroy()
    engine = compact_engine(Setup(3), nudge)
    attach(engine, mask_of(engine))
    engine.load_checkpoint(str(folder))


def resume_with_another_base_at_stage_0(folder: Path) -> None:
    saved(folder, Setup(0)).destroy()
    engine = compact_engine(Setup(0), nudge)
    engine.load_checkpoint(str(folder))
    attach(engine, mask_of(engine))


def resume_with_another_mask(folder: Path) -> None:
    saved(folder, Setup(2)).destroy()
    engine = compact_engine(Setup(2))
    mask = mask_of(engine)
    for name, index in mask.index.items():
        if index.numel() and int(index[0]) > mask.layout.partition(mask.layout.parameters[0]).start:
            mask.index[name] = torch.cat([index[:1] - 1, index[1:]])
            break
    attach(engine, mask)
    engine.load_checkpoint(str(folder))


def optimizer_of_everything(folder: Path) -> None:
    model = make_model(FAMILY)
    optimizer = adamw(model)
    prepare_compact(model, num_selected=NUM_SELECTED)
    engine = make_engine(model, Setup(0), optimizer)
    with suppress(KeyError):
        attach(engine, mask_of(engine))


def another_number(folder: Path) -> None:
    model = make_model(FAMILY)
    prepare_compact(model, num_selected=NUM_SELECTED + 1)
    engine = make_engine(model, Setup(3), adamw(model))
    attach(engine, mask_of(engine))


def frozen(folder: Path) -> None:
    model = make_model(FAMILY)
    model.lm_head.weight.requires_grad_(False)
    prepare_compact(model, num_selected=NUM_SELECTED)
    engine = make_engine(model, Setup(2), adamw(model))
    attach(engine, mask_of(engine))


def another_dtype(folder: Path) -> None:
    model = make_model(FAMILY)
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
    prepare_compact(model, num_selected=NUM_SELECTED)
    engine = make_engine(model, Setup(0), adamw(model))
    attach(engine, mask_of(engine))


def prepared_twice(folder: Path) -> None:
    model = make_model(FAMILY)
    prepare_compact(model, RATIO)
    prepare_compact(model, RATIO)


def statistics_after_attach(_: Path) -> None:
    engine = compact_engine(Setup(3))
    attach(engine, mask_of(engine))
    collect_statistics(engine, make_micro_batches(FAMILY))


REFUSALS = {
    "attached": statistics_after_attach,
    "base": resume_with_another_base,
    "base-stage0": resume_with_another_base_at_stage_0,
    "mask": resume_with_another_mask,
    "optimizer": optimizer_of_everything,
    "number": another_number,
    "frozen": frozen,
    "dtype": another_dtype,
    "twice": prepared_twice,
}


if __name__ == "__main__":
    main()
    sys.exit(0)
