"""A job: statistics passes under DeepSpeed on the ranks of one process group; results for test_statistics.py.

Arguments: folder, the folder of another job whose files are to be read, if any, and EVERY for the cases that only
make test-all takes through three ranks.
"""

import random
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules

from piece_ds.checkpoint.mask_file import load_mask, save_mask
from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.methods.estimate import estimate_mask, select
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible
from piece_ds.selection.candidates import LastPassFilter
from piece_ds.selection.estimators import PIECE_S
from piece_ds.state.statistics import GradientStats
from piece_ds.zero import statistics
from piece_ds.zero.statistics import collect_statistics
from support.engines import adamw, make_engine
from support.jobs import Results, collect_case, finish, start
from support.models import Body, make_model
from support.nondeterministic import install
from support.selection_cases import blocks_layout, make_stats
from support.statistics_cases import EVERY, METHODS, PLAIN, RATIOS, SPECIAL, THREE_RANKS, VISION, Case


def main() -> None:
    folder = start()
    results: Results = {}
    three = {name: case for name, case in PLAIN.items() if (name in THREE_RANKS) != (EVERY in sys.argv)}
    cases = {1: PLAIN | VISION, 2: PLAIN | VISION | SPECIAL, 3: three}[dist.get_world_size()]
    for name, case in cases.items():
        collect_case(results, name, lambda case=case: run_case(case))  # type: ignore[misc]
    if EVERY in sys.argv:
        finish(results)
        return
    collect_case(results, "selection", run_selection)
    if len(sys.argv) > 2:
        collect_case(results, "files", lambda: read_files(Path(sys.argv[2])))
    else:
        collect_case(results, "files", lambda: write_files(folder))
    finish(results)


def run_case(case: Case) -> dict[str, Any]:
    model = make_model(case.family, case.dropout)
    if case.freeze:
        freeze_ineligible(model, patterns=[case.eligible] if case.eligible else [])
    if case.checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
    if case.family == "branches":
        set_z3_leaf_modules(model, [Body])
    if case.nondeterministic:
        install(model.model.layers[1].mlp, case.nondeterministic)
    engine = make_engine(model, case.setup, adamw(model))
    engine.train(not case.in_eval_mode)
    before = surroundings(engine)
    with (
        mock.patch.object(statistics, "BUCKET_ELEMENTS", case.bucket_elements or statistics.BUCKET_ELEMENTS),
        mock.patch.object(statistics, "_may_vary", return_value=bool(case.nondeterministic)),
    ):
        last_pass = LastPassFilter(layout_of(model), PIECE_S, RATIOS[0], lam=1.0)
        stats = collect_statistics(engine, case.batches(), last_pass=last_pass)
    after = surroundings(engine)
    candidates = last_pass.proven()
    masks = {
        (method, ratio): estimate_mask(engine, [], method=method, ratio=ratio, layout=stats.layout, stats=stats)
        for method in METHODS
        for ratio in RATIOS
    }
    result = {
        "sums": whole(stats, "grad_sum"),
        "squares": whole(stats, "square_sum"),
        "num_nonfinite": stats.num_nonfinite,
        "num_micro_batches": stats.num_micro_batches,
        "masks": {key: mask.whole() for key, mask in masks.items()},
        "proven": candidates is not None,
        "mask_of_last_pass": select(stats.layout, "piece-s", RATIOS[0], stats, candidates=candidates).whole(),
        "num_selected": {key: mask.num_selected for key, mask in masks.items()},
        "changed": [key for key in before if before[key] != after[key]],
        "leftover_gradients": [n for n, p in engine.module.named_parameters() if p.grad is not None],
    }
    engine.destroy()
    return result


def surroundings(engine: Any) -> dict[str, Any]:
    """What the pass must leave alone, besides weights and optimizer: modes, dropout rates, random states, hooks."""
    modules = dict(engine.module.named_modules())
    return {
        "training": {name: module.training for name, module in modules.items()},
        "rates": {f"{n}.{k}": v for n, m in modules.items() for k, v in vars(m).items() if "drop" in k},
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "micro_steps": (engine.micro_steps, engine.global_steps),
        "hooks": [len(p._post_accumulate_grad_hooks or ()) for p in engine.module.parameters()],
    }


def whole(stats: GradientStats, which: str) -> dict[str, np.ndarray]:
    """Every parameter's statistics, from all ranks' fragments."""
    values = getattr(stats, which)
    mine = {info.name: values[o : o + part.numel].numpy() for info, part, o in stats.layout.owned()}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return {name: np.concatenate([fragments[name] for fragments in every]) for name in mine}


def run_selection() -> dict[str, Any]:
    """The data-free methods on this number of ranks; by statistics, unit/test_ranks.py selects."""
    return {
        "random": select(blocks_layout(), "random", 0.3, seed=5).whole(),
        "magnitude": select(
            blocks_layout(), "magnitude", 0.3, weight_of=lambda name, start, numel: magnitudes(start, numel)
        ).whole(),
    }


def magnitudes(start: int, numel: int) -> torch.Tensor:
    """Weights with many ties that depend on the position alone."""
    return (torch.arange(start, start + numel) % 7 - 3.0) * 0.5


def write_files(folder: Path) -> dict[str, Any]:
    """A mask and statistics of this job, for jobs of other sizes to read."""
    stats = make_stats("random")
    stats.num_micro_batches, stats.num_nonfinite = 12, 3
    save_statistics(folder / "statistics", stats, {"file": "rows.json"})
    mask = select(stats.layout, "piece-s", 0.3, stats)
    save_mask(folder / "mask.safetensors", mask)
    return {"mask": mask.whole()}


def read_files(folder: Path) -> dict[str, Any]:
    layout = blocks_layout()
    stats = load_statistics(folder / "statistics", layout, needs_sum=True, source={"file": "rows.json"})
    mask = load_mask(folder / "mask.safetensors", layout)
    return {
        "mask": mask.whole(),
        "num_selected": mask.num_selected,
        "sums": whole(stats, "grad_sum"),
        "squares": whole(stats, "square_sum"),
        "counts": (stats.num_micro_batches, stats.num_nonfinite),
    }


if __name__ == "__main__":
    main()
