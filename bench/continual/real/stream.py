"""The study's stream: three tasks of TRACE one after another on one model, judged after each; resumable.

python bench/continual/real/stream.py [--trace FOLDER] [--seeds 1,2] [--hours H]

Everything but the order of tasks is as in run.py: rows, steps, texts, general importance. SETTINGS was written down
before the first run; its last three lines after 13 runs: what `--recipe wide` is in a stream, and EWC, whose penalty on
a mean weight is of the size of its gradient at a lambda of about 1e6 here (the default, 400, changes nothing). A
finished run is a row of results/stream.csv; results/stream.md is written after each.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Iterable
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from bench.continual.real.grid import SWEEPS, Setting, Sweep
from bench.continual.real.recipe import SMOKE, Recipe
from bench.continual.real.run import RESULTS, ROOT, device_of_runs, flags_of, judged_before, load, write_task
from bench.continual.real.runs import Record, add_run, read_runs
from bench.continual.real.texts import Judge, Judged
from bench.record import commit_of
from piece_ds.cli.run import train
from piece_ds.config.settings import load_settings
from piece_ds.evaluation.matrix import Measure
from piece_ds.models.pretrained import model_source
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_text
from piece_ds.runtime.process import run_command

TASKS = ("FOMC", "NumGLUE-ds", "C-STANCE")
SEEDS = (1, 2)

# Sweeps of a stream alone: on one task EWC is full fine-tuning.
OF_STREAMS = (
    Sweep("EWC, lambda 1e5", "ewc", (1e-4,), ewc_lambda=1e5),
    Sweep("EWC, lambda 1e7", "ewc", (1e-4,), ewc_lambda=1e7),
)

# Sweep of the grid -> its rates here. They are those of the runs on single tasks that learn about as much as each
# other: two rates where a method's own best is in doubt. In the order in which they are made.
SETTINGS: dict[str, tuple[float, ...]] = {
    "full": (3e-5, 1e-4),
    "LoRA": (3e-4, 1e-3),
    "ratio 1 %, scaled steps": (1e-3,),
    "full, scaled steps": (1e-4,),
    "ratio 1 %, scaled steps + KL, as many rows": (1e-3,),
    "full, scaled steps + KL, as many rows": (1e-4,),
    "PIECE-S 0.1 %": (3e-4, 1e-3),
    "full + replay": (1e-4,),
    "LoRA + replay": (3e-4,),
    "random 10 %, scaled steps + KL": (1e-3,),
    "EWC, lambda 1e5": (1e-4,),
    "EWC, lambda 1e7": (1e-4,),
}


def main(argv: list[str]) -> None:
    """Make the runs that are not there yet, until the time is over."""
    options = _options(argv)
    recipe = SMOKE if options.smoke else Recipe()
    deadline = time.monotonic() + 3600 * options.hours
    options.cache.mkdir(parents=True, exist_ok=True)

    # The base model: what all runs start from and are judged against.
    model = Path(model_source("smollm2-135m"))
    judge, before = judged_before(model, options.trace, options.cache, recipe)

    done = {(run["name"], run["rate"], run["seed"]) for run in read_runs(options.runs_file)}
    for setting in settings_in_order(options.seeds):
        if (setting.sweep.name, f"{setting.rate:g}", str(setting.seed)) in done:
            continue
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            break
        begin = time.monotonic()
        add_run(options.runs_file, one_run(setting, recipe, options, model, judge, before))
        write_text(options.runs_file.with_suffix(".md"), stream_page(read_runs(options.runs_file)))
        print(f"{setting.key}: {time.monotonic() - begin:.0f} s", flush=True)


def settings_in_order(seeds: tuple[int, ...] = SEEDS) -> list[Setting]:
    """Return all runs: every setting with the first seed, then with the next."""
    by_name = {sweep.name: sweep for sweep in (*SWEEPS, *OF_STREAMS)}
    return [
        Setting(by_name[name], "+".join(TASKS), rate, seed)
        for seed in seeds
        for name, rates in SETTINGS.items()
        for rate in rates
    ]


def one_run(
    setting: Setting, recipe: Recipe, options: argparse.Namespace, model: Path, judge: Judge, before: dict[str, Judged]
) -> Record:
    """Train the stream with one setting; measure every task and every judged text after each task."""
    scratch = options.cache / "scratch-stream"
    shutil.rmtree(scratch, ignore_errors=True)
    for task in TASKS:
        task_dir = write_task(task, options, recipe)

    flags = flags_of_stream(setting, recipe, options, model, task_dir, scratch)
    begin = time.perf_counter()
    results, folder = train(load_settings(flags))
    seconds = time.perf_counter() - begin

    # Judge the model after each task, and take the stream's own figures from the matrix.
    figures: dict[str, float | None] = {}
    for index, task in enumerate(TASKS):
        tuned = judge.measure(load(folder.model(index, task)))
        figures[f"rise after {index + 1}"] = _mean(tuned[kind].loss - before[kind].loss for kind in tuned)
        figures[f"kl after {index + 1}"] = _mean(tuned[kind].kl for kind in tuned)
    for name, measure in (("loss", results.matrix.loss), ("score", results.matrix.score)):
        figures |= of_measure(name, measure)
    figures["delta_bytes"] = sum(path.stat().st_size for path in folder.root.glob("0*-*/delta.safetensors"))
    figures["seconds"] = seconds
    shutil.rmtree(scratch)
    facts = {"device": device_of_runs(), "torch": torch.__version__, "commit": commit_of()}
    head = dict(zip(("name", "task", "rate", "seed"), setting.key, strict=True))
    cells = {name: "" if value is None else f"{value:.6g}" for name, value in figures.items()}
    return {**head, **cells, **facts, "date": date.today().isoformat()}


def flags_of_stream(
    setting: Setting, recipe: Recipe, options: argparse.Namespace, model: Path, task_dir: Path, output_dir: Path
) -> list[str]:
    """Return the flags of a run on one task, but for what makes it a stream.

    Answers are judged as TRACE judges them. A task's statistics belong to the model that the tasks before it left, so
    none are kept for another run.
    """
    flags = flags_of(setting, recipe, options, model, task_dir, output_dir)
    for name in ("--scorers", "--statistics_file"):
        if name in flags:
            del flags[flags.index(name) : flags.index(name) + 2]
    return [*flags, "--tasks", ",".join(TASKS), "--save_model", "each"]


def stream_page(runs: list[Record]) -> str:
    """Return the table of all runs: what is known of the tasks at the end, and what is left of everything else."""
    heads = ("method", "rate", "seed", "loss, learned", "loss at the end", "BWT of loss")
    heads += ("accuracy, learned", "accuracy at the end", "BWT of accuracy", "rise", "KL", "deltas, MB")
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for run in runs:
        number = {name: float(value) if value else float("nan") for name, value in run.items() if _is_figure(name)}
        cells = [run["name"], run["rate"], run["seed"]]
        cells += [f"{number[f'loss {name}']:.3f}" for name in ("learning", "overall")]
        cells.append(f"{number['loss backward transfer']:+.3f}")
        cells += [f"{number[f'score {name}']:.1%}" for name in ("learning", "overall")]
        cells.append(f"{100 * number['score backward transfer']:+.1f}")
        last = len(TASKS)
        cells += [f"{number[f'rise after {last}']:+.3f}", f"{number[f'kl after {last}']:.3f}"]
        cells.append(f"{number['delta_bytes'] / 1e6:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    planned = len(settings_in_order())
    text = [
        f"# {len(TASKS)} tasks in a row, on SmolLM2-135M-Instruct",
        f"{' -> '.join(TASKS)}. {len(runs)} of the {planned} planned runs are made.",
        "Learned: mean over tasks, each right after its training. At the end: all after the last task. BWT: what later "
        "tasks did to earlier ones (loss: below 0 is good; accuracy in points: above 0 is good). Losses are nats per "
        "answer token on held-out rows; accuracy is by generation. Rise and KL: on texts no method saw, after the "
        "last task.",
        "\n".join(lines),
    ]
    return "\n\n".join(text) + "\n"


def of_measure(name: str, measure: Measure) -> dict[str, float | None]:
    """Return the figures of a measure along the stream, and its value of every task before, after it, at the end."""
    found = {
        f"{name} learning": measure.learning(),
        f"{name} overall": measure.overall(),
        f"{name} backward transfer": measure.backward_transfer(),
    }
    for index, task in enumerate(TASKS):
        found[f"{name} {task} before"] = measure.before[index] if measure.before else None
        found[f"{name} {task} learned"] = measure.after[index][index]
        found[f"{name} {task} at the end"] = measure.after[-1][index]
    return found


def _is_figure(name: str) -> bool:
    return name.startswith(("loss ", "score ", "rise ", "kl ")) or name == "delta_bytes"


def _mean(values: Iterable[float]) -> float:
    kept = list(values)
    return sum(kept) / len(kept)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=ROOT.parent / "shared" / "trace", help="folder of TRACE's tasks")
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=SEEDS)
    parser.add_argument("--hours", type=float, default=1e6, help="begin no run after so many hours")
    parser.add_argument("--runs_file", type=Path, default=RESULTS / "stream.csv")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "study", help="statistics and scratch files")
    parser.add_argument("--smoke", action="store_true", help="two steps a run: does it work? The figures say nothing")
    options = parser.parse_args(argv)
    if not options.trace.is_dir():
        raise UserError(f"--trace {options.trace}: no such folder; expected TRACE's tasks, TASK/train.json each")
    return options


if __name__ == "__main__":
    run_command(main)
