"""What is left of a model trained whole, if only some of its changes stay? A probe of the study; resumable.

python bench/continual/real/pruned.py [--trace FOLDER] [--hours H]

A mask is chosen before training, from gradients of the base model. Here all weights train, and the mask is chosen
afterwards: of the finished change only a share of the model's elements is kept, the others get the base's bits back.
The delta is then as small as a mask's of that ratio. What it learned and lost is held against a mask's
(results/runs*.csv, same rows, steps and judges). Kept are the largest changes ('change': what `piece_ds delta diff
--ratio` keeps), or those that lower the loss on the task's training rows most ('loss': `piece_ds delta
prune --by loss`).

Questions: does pruning to 10 % or 1 % keep most of what was learned? Does it rise less than a mask that learned as
much?
SETTINGS, SHARES and CRITERIA were written down before the first run. A row of results/pruned.csv is one share.
"""

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from torch import Tensor
from transformers import AutoTokenizer

from bench.continual.real.grid import SWEEPS, Setting
from bench.continual.real.recipe import SMOKE, Recipe
from bench.continual.real.run import (
    device_of_runs,
    flags_of,
    for_model,
    judged_before,
    load,
    model_folder,
    options_of,
    results_folder,
    train_setting,
    write_task,
)
from bench.continual.real.runs import COLUMNS, add_run, read_runs
from bench.continual.real.texts import Judge, Judged
from bench.record import commit_of
from piece_ds.config.settings import load_settings
from piece_ds.data.image_collate import make_collator
from piece_ds.data.tasks import load_task_stream
from piece_ds.deltas.delta import open_delta
from piece_ds.deltas.difference import diff_folders
from piece_ds.deltas.folder import open_folder
from piece_ds.deltas.live import apply_delta_
from piece_ds.deltas.loss_effect import loss_effects
from piece_ds.deltas.scale import keep_largest
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.models.layout import layout_of
from piece_ds.models.stored_names import stored_names
from piece_ds.runtime.process import run_command

# Of the grid: sweep, task, rate. Where much is to be learned first, since there a mask of 1 % stops early.
SETTINGS = (
    ("full, scaled steps", "Py150", 3e-4),
    ("full, scaled steps + KL", "Py150", 3e-4),
    ("full", "Py150", 3e-4),
    ("full, scaled steps", "NumGLUE-ds", 1e-4),
    ("full, scaled steps", "ScienceQA", 3e-4),
)
SHARES = (0.1, 0.01, 0.001)  # of the model's elements
CRITERIA = ("change", "loss")


def main(argv: list[str]) -> None:
    """Train each setting whose rows are not there yet, and judge what is left of it at every share."""
    hours = {"type": float, "default": 1e6, "help": "begin no run after so many hours"}
    kept_in = {"type": Path, "help": "default: results/pruned.csv; of another model, results/NAME"}
    options = options_of(argv, __doc__, {"--hours": hours, "--pruned_file": kept_in})
    runs_file = options.pruned_file or results_folder(Path(options.model).name) / "pruned.csv"
    recipe = SMOKE if options.smoke else Recipe()
    deadline = time.monotonic() + 3600 * options.hours
    options.cache.mkdir(parents=True, exist_ok=True)
    model = model_folder(options.model, options.cache)
    judge, before = judged_before(model, options.trace, options.cache, recipe)
    sweeps = {sweep.name: sweep for sweep in SWEEPS}
    done = {tuple(run[name] for name in COLUMNS) for run in read_runs(runs_file)}
    for name, task, rate in SETTINGS:
        (setting,) = for_model([Setting(sweeps[name], task, rate, 1)], options.model)
        names = [f"{name}: {kept}" for kept in _all_kept()]
        if all((kept, *setting.key[1:]) in done for kept in names):
            continue
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            break
        for kept, figures in _judged_shares(setting, recipe, options, model, judge, before):
            facts = {"device": device_of_runs(), "commit": commit_of(), "date": date.today().isoformat()}
            key = dict(zip(COLUMNS, (f"{name}: {kept}", *setting.key[1:]), strict=True))
            add_run(runs_file, {**key, **{what: f"{value:.6g}" for what, value in figures.items()}, **facts})
            print(f"{key}: {figures}", flush=True)


def _all_kept() -> list[str]:
    return ["all", *(f"{share:g} by {by}" for share in SHARES for by in CRITERIA)]


def _judged_shares(
    setting: Setting, recipe: Recipe, options: argparse.Namespace, model: Path, judge: Judge, before: dict[str, Judged]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Train a setting; yield each of _all_kept() with what it learned and lost. Arguments as those of one_run()."""
    # Train, and write every element that moved as one delta. Both ends of it are in the dtype of runs.
    scratch = options.cache / "scratch-pruned"
    _, folder, _ = train_setting(setting, recipe, options, model, scratch)
    gc.collect()  # the optimizer's states
    base_folder = scratch / "base"
    base = load(model)
    base.save_pretrained(base_folder)
    parts = layout_of(base), stored_names(base)
    first, second = open_folder(base_folder, *parts), open_folder(folder.model(0, setting.task), *parts)
    diff_folders(first, second, scratch / "whole.safetensors")
    whole = open_delta(scratch / "whole.safetensors")
    total = sum(param.numel() for param in base.parameters())

    # How much each change lowers the loss on the rows that it was trained on.
    flags = flags_of(setting, recipe, options, model, write_task(setting.task, options, recipe), scratch)
    tokenizer = AutoTokenizer.from_pretrained(model)
    (task,) = load_task_stream(load_settings(flags).data, tokenizer)
    collate = make_collator(tokenizer)
    rows = [task.train[index] for index in range(len(task.train))]
    batches = (
        {name: values.to(base.device) for name, values in collate(rows[begin : begin + recipe.rows]).items()}
        for begin in range(0, len(rows), recipe.rows)
    )
    scores: dict[str, dict[str, Tensor]] = {
        "change": {name: (c.values.double() - c.previous.double()).abs() for name, c in whole.changes()},
        "loss": loss_effects(base, whole, batches),
    }

    # Put each share on the base in memory, judge it, and take it off again.
    def judged(path: Path) -> dict[str, float]:
        live = apply_delta_(base, path)
        found = judge.measure(base)
        learned = evaluate_loss(base, task.test, collate, recipe.rows, base.device).mean
        live.set_(0.0)
        rises = [found[kind].loss - before[kind].loss for kind in found]
        return {
            "learned": learned,
            "rise": sum(rises) / len(rises),
            "kl": sum(one.kl for one in found.values()) / len(found),
            "delta_bytes": path.stat().st_size,
        }

    yield "all", judged(whole.path)
    for share in SHARES:
        for by in CRITERIA:
            path = scratch / "kept.safetensors"
            keep_largest(whole, min(1.0, share * total / whole.num_selected), scores[by], path)
            yield f"{share:g} by {by}", judged(path)
    shutil.rmtree(scratch)


if __name__ == "__main__":
    run_command(main)
