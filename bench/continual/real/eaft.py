"""Does a loss weighted by entropy (EAFT, arXiv 2601.02151) forget less at equal learning? A probe; resumable.

python bench/continual/real/eaft.py [--trace FOLDER] [--hours H]

EAFT multiplies each token's cross-entropy by the model's own uncertainty there: the entropy of its 20 likeliest words,
divided by ln 20. Confident mistakes, whose gradients are largest, then hardly count. Everything else is as in run.py,
whose runs with plain cross-entropy are what these are held against. Importance and all figures are those of plain
cross-entropy. SETTINGS was written down before the first run. A finished run is a row of results/eaft.csv.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor
from torch.nn import functional

from bench.continual.real.grid import SWEEPS, Setting
from bench.continual.real.recipe import Recipe
from bench.continual.real.run import RESULTS, ROOT, judged_before, one_run
from bench.continual.real.runs import COLUMNS, add_run, read_runs
from piece_ds.models.pretrained import model_source
from piece_ds.runtime.process import run_command
from piece_ds.training.trainer import TaskTrainer

NUM_WORDS = 20

# Sweep of the grid -> its rates here: weights below 1 slow learning, so the rates are the higher ones of each sweep.
SETTINGS: dict[str, tuple[float, ...]] = {
    "full": (1e-4, 3e-4),
    "ratio 1 %, scaled steps": (1e-3, 3e-3),
    "LoRA": (1e-3, 3e-3),
}
TASKS = ("FOMC", "NumGLUE-ds")


def main(argv: list[str]) -> None:
    """Make the runs that are not there yet, until the time is over."""
    options = _options(argv)
    recipe, deadline = Recipe(), time.monotonic() + 3600 * options.hours
    options.cache.mkdir(parents=True, exist_ok=True)
    model = Path(model_source("smollm2-135m"))
    judge, before = judged_before(model, options.trace, options.cache, recipe)

    weigh_by_entropy()
    by_name = {sweep.name: sweep for sweep in SWEEPS}
    done = {tuple(run[name] for name in COLUMNS) for run in read_runs(options.runs_file)}
    for task in TASKS:
        for name, rates in SETTINGS.items():
            for rate in rates:
                setting = Setting(replace(by_name[name], name=f"{name}, EAFT"), task, rate, 1)
                if setting.key in done or time.monotonic() > deadline:
                    continue
                record = one_run(setting, recipe, options, model, judge, before)
                add_run(options.runs_file, record)
                print(f"{setting.key}: {[record[kind] for kind in ('learned', 'rise', 'kl')]}", flush=True)


def weigh_by_entropy() -> None:
    """Let every trainer of tasks train on eaft_loss()."""
    made = TaskTrainer.__init__

    def make(self: TaskTrainer, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.compute_loss_func = eaft_loss

    TaskTrainer.__init__ = make  # type: ignore[method-assign]


def eaft_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the mean over answer tokens of cross-entropy times entropy, as transformers' Trainer calls it.

    Args:
        outputs: of the model, with logits [rows, tokens, words].
        labels: int64, [rows, tokens], -100 where nothing is learned.
        num_items_in_batch: what the sum is divided by; None means the counted labels.
    """
    targets = labels[:, 1:].to(outputs.logits.device)
    counted = targets != -100
    logits_NV, targets_N = outputs.logits[:, :-1][counted].float(), targets[counted]

    # The weight is a number, not a path for gradients: nothing may be learned by becoming uncertain.
    with torch.no_grad():
        likeliest = logits_NV.topk(NUM_WORDS, dim=-1).values.log_softmax(dim=-1)
        weights_N = -(likeliest.exp() * likeliest).sum(dim=-1) / math.log(NUM_WORDS)
    losses_N = functional.cross_entropy(logits_NV, targets_N, reduction="none")
    return (weights_N * losses_N).sum() / (targets_N.numel() if num_items_in_batch is None else num_items_in_batch)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=ROOT.parent / "shared" / "trace", help="folder of TRACE's tasks")
    parser.add_argument("--hours", type=float, default=1e6, help="begin no run after so many hours")
    parser.add_argument("--runs_file", type=Path, default=RESULTS / "eaft.csv")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "study", help="statistics and scratch files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
