"""The study on a real model: TRACE's tasks one by one, through the product's own path; resumable.

python bench/continual/real/run.py [--trace FOLDER] [--model smollm2-135m] [--tasks T,T] [--seeds 1,2] [--hours H]

A finished run is a row of results/runs.csv and is not made again. grid.py holds every setting and was written first.
Runs are in bf16. A processor that multiplies it slowly trains in fp32, and counts as another device: its rows are in
results/runs-cpu-fp32.csv.
"""

import argparse
import gc
import json
import shutil
import sys
import time
import traceback
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.continual.real.gemma import NAME as GEMMA
from bench.continual.real.gemma import RATE_FACTOR as GEMMA_RATE
from bench.continual.real.gemma import gemma_folder
from bench.continual.real.grid import SEEDS, SWEEPS, TASKS, Setting, rescaled, settings_in_order
from bench.continual.real.recipe import SMOKE, Recipe
from bench.continual.real.runs import COLUMNS, add_run, read_runs
from bench.continual.real.texts import Judge, Judged, make_judge, write_real_text
from bench.record import commit_of, device_name
from piece_ds.cli.run import train
from piece_ds.config.settings import load_settings
from piece_ds.models.pretrained import model_source
from piece_ds.report.results import RunResults
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_text
from piece_ds.runtime.process import run_command
from piece_ds.runtime.processor import bf16_is_slow
from piece_ds.training.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[3]
RESULTS = Path(__file__).resolve().parent / "results"
FIRST_MODEL = "smollm2-135m"
FP32 = "-fp32"  # ends the name of a device that trains so


def main(argv: list[str]) -> None:
    """Make the runs that are not there yet, until the time is over."""
    hours = {"type": float, "default": 1e6, "help": "begin no run after so many hours"}
    options = options_of(argv, __doc__, {"--hours": hours})
    recipe = SMOKE if options.smoke else Recipe()
    deadline = time.monotonic() + 3600 * options.hours
    options.cache.mkdir(parents=True, exist_ok=True)
    model = model_folder(options.model, options.cache)
    judge, before = judged_before(model, options.trace, options.cache, recipe)
    done = {tuple(run[name] for name in COLUMNS[:4]) for run in read_runs(options.runs_file)}
    settings = settings_in_order(options.tasks, options.seeds, options.names)
    wanted = [setting for setting in for_model(settings, options.model) if setting.key not in done]
    print(f"{len(wanted)} runs to make; base: {before}", flush=True)
    failed = []
    for setting in wanted:
        if time.monotonic() > deadline:
            print("out of time", flush=True)
            break
        begin = time.monotonic()
        try:
            record = one_run(setting, recipe, options, model, judge, before)
        except Exception:
            traceback.print_exc()
            failed.append(" ".join(setting.key))
            continue
        add_run(options.runs_file, record)
        shown = {name: record[name] for name in ("learned", "rise", "kl")}
        print(f"{setting.key}: {shown}, {time.monotonic() - begin:.0f} s", flush=True)
        gc.collect()

    # One setting's failure must not keep the others from running, nor pass for success.
    if failed:
        sys.exit("failed: " + "; ".join(failed))


def model_folder(name: str, cache: Path) -> Path:
    """Return the folder of a model of --model, fetched if it is not there yet."""
    return gemma_folder(cache) if name == GEMMA else Path(model_source(name))


def for_model(settings: list[Setting], name: str) -> list[Setting]:
    """Return settings at the rates of a model of --model."""
    return [rescaled(setting, GEMMA_RATE if name == GEMMA else 1.0) for setting in settings]


def judged_before(model: Path, trace: Path, cache: Path, recipe: Recipe) -> tuple[Judge, dict[str, Judged]]:
    """Write the real text that runs may be given; return who judges them, and what the base model is judged to be."""
    lima = trace.parent / "general" / "lima.json"
    write_real_text(lima, cache / "real.jsonl", recipe)
    judge = make_judge(AutoTokenizer.from_pretrained(model), lima, recipe)
    return judge, judge.measure(load(model))


def one_run(
    setting: Setting,
    recipe: Recipe,
    options: argparse.Namespace,
    model: Path,
    judge: Judge,
    before: dict,
    *,
    scratch: Path | None = None,
) -> dict[str, str]:
    """Train one setting and measure what it learned and what it lost.

    Args:
        setting: what to train.
        recipe: its budget.
        options: trace, the folder of tasks, and cache, that of statistics.
        model: folder of the base model.
        judge, before: from judged_before().
        scratch: of the run's files, which are removed; None means a folder of the cache.
    """
    scratch = scratch or options.cache / "scratch"
    results, folder, seconds = train_setting(setting, recipe, options, model, scratch)
    tuned = judge.measure(load(folder.model(0, setting.task)))
    delta = sum(path.stat().st_size for path in folder.root.glob("00-*/delta.safetensors"))
    shutil.rmtree(scratch)

    kinds = list(tuned)
    rises = {kind: tuned[kind].loss - before[kind].loss for kind in kinds}
    matrix = results.matrix
    head = dict(zip(COLUMNS[:4], setting.key, strict=True))
    figures = {
        "learned_before": matrix.loss.before[0] if matrix.loss.before else None,
        "learned": matrix.loss.after[0][0],
        "rise": sum(rises.values()) / len(kinds),
        "kl": sum(tuned[kind].kl for kind in kinds) / len(kinds),
        **{f"rise {kind}": rises[kind] for kind in kinds},
        **{f"kl {kind}": tuned[kind].kl for kind in kinds},
        "seconds": seconds,
        "delta_bytes": delta,
        "delta_scale": results.forgetting[setting.task]["delta_scale"] if setting.sweep.budget else None,
    }
    facts = {
        "device": device_of_runs(),
        "torch": torch.__version__,
        "commit": commit_of(),
        "date": date.today().isoformat(),
    }
    return {**head, **{name: "" if v is None else f"{v:.6g}" for name, v in figures.items()}, **facts}


def train_setting(
    setting: Setting, recipe: Recipe, options: argparse.Namespace, model: Path, scratch: Path
) -> tuple[RunResults, RunFolder, float]:
    """Train one setting in an empty folder; return its results, its files and the seconds taken. See one_run()."""
    shutil.rmtree(scratch, ignore_errors=True)
    task_dir = write_task(setting.task, options, recipe)
    begin = time.perf_counter()
    results, folder = train(load_settings(flags_of(setting, recipe, options, model, task_dir, scratch)))
    return results, folder, time.perf_counter() - begin


def flags_of(
    setting: Setting, recipe: Recipe, options: argparse.Namespace, model: Path, task_dir: Path, output_dir: Path
) -> list[str]:
    """The flags of a run, as launch/train.py reads them."""
    sweep = setting.sweep
    flags = {
        "deepspeed": ROOT / "ds_configs" / "zero0.json",
        **({"dtype": "float32"} if bf16_is_slow() else {"bf16": True}),
        "model_name_or_path": model,
        "task_dir": task_dir,
        "tasks": setting.task,
        "max_prompt_len": recipe.max_prompt_len,
        "max_ans_len": recipe.max_ans_len,
        "method": sweep.method,
        "importance_batch_size": recipe.importance_batch_size,
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.rows,
        "per_device_eval_batch_size": recipe.rows,
        "learning_rate": setting.rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "adam_beta2": recipe.adam_beta2,
        "scorers": f"{setting.task}=loss",
        "seed": setting.seed,
        "logging_steps": recipe.steps,
        "save_model": "last",
        "output_dir": output_dir,
    }
    if sweep.ratio is not None:
        flags |= {"mask_ratio": sweep.ratio, "importance_rows": sweep.importance_rows or recipe.importance_rows}
        # All rates of a task and seed select from the same statistics, which are kept from the first of them.
        if sweep.method in ("piece-s", "piece-f"):
            flags["statistics_file"] = options.cache / f"task-{sweep.method}-{setting.seed}"
    if sweep.general_text:
        flags["general_text"] = "self" if sweep.general_text == "self" else options.cache / "real.jsonl"
        # A budget holds rows out to judge on, so its statistics are of other rows, and only some methods take any.
        apart = "-judged-apart" if sweep.budget else ""
        if sweep.scaled or not sweep.budget:
            flags["general_statistics"] = options.cache / f"statistics-{sweep.general_text}{apart}"
    if sweep.scaled:
        flags["step_scale"] = "general"
    if sweep.replay:
        flags["general_replay"] = sweep.replay
    if sweep.divergence:
        flags["general_kl"] = sweep.divergence
    if sweep.budget:
        flags["forgetting_budget"] = sweep.budget
    if sweep.share:
        flags["general_share"] = sweep.share
    if sweep.spread:
        flags["budget"] = sweep.spread
    if sweep.unit:
        flags["unit"] = sweep.unit
    if sweep.ewc_lambda:
        flags["ewc_lambda"] = sweep.ewc_lambda
    if sweep.adapter:
        flags["peft_config"] = options.cache / f"{sweep.name}.json"
        write_text(flags["peft_config"], json.dumps(dict(sweep.adapter)))
    return [item for name, value in flags.items() for item in (f"--{name}", str(value))]


def write_task(task: str, options: argparse.Namespace, recipe: Recipe) -> Path:
    """Write the rows of a task that the study uses; return the folder of all tasks."""
    folder = options.cache / "tasks"
    for split, num_rows in (("train", recipe.train_rows), ("test", recipe.test_rows)):
        rows = json.loads((options.trace / task / f"{split}.json").read_text(encoding="utf-8"))[:num_rows]
        path, text = folder / task / f"{split}.json", json.dumps(rows)
        # Runs side by side read the same files.
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return folder


def load(folder: Path) -> AutoModelForCausalLM:
    """Return the model of a folder, in the dtype of runs, on the device that they train on."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if bf16_is_slow() else torch.bfloat16)
    return model.to(get_accelerator().current_device_name())


def device_of_runs() -> str:
    """Return the device's name in the rows of runs; in fp32 it is another one."""
    return device_name() + (FP32 if bf16_is_slow() else "")


def results_folder(model: str) -> Path:
    """Return where the results of a model are kept."""
    return RESULTS if model == FIRST_MODEL else RESULTS / model


def options_of(argv: list[str], description: str | None, also: dict[str, dict[str, Any]]) -> argparse.Namespace:
    """Return the options of a command that makes runs of the grid.

    Args:
        argv: its words.
        description: of the command.
        also: options of its own -> arguments of add_argument().
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=ROOT.parent / "shared" / "trace", help="folder of TRACE's tasks")
    parser.add_argument("--model", default=FIRST_MODEL, help=f"{GEMMA}, a folder, or a name that the product knows")
    parser.add_argument("--tasks", type=lambda text: tuple(text.split(",")), default=TASKS)
    parser.add_argument("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=SEEDS)
    parser.add_argument("--names", type=lambda text: tuple(text.split(";")), help="only these sweeps, split by ';'")
    parser.add_argument("--runs_file", type=Path, help="default: results/runs.csv; of another model, results/NAME")
    parser.add_argument("--cache", type=Path, help="statistics and scratch files; default: runs/study, or runs/NAME")
    parser.add_argument("--smoke", action="store_true", help="two steps a run: does it work? The figures say nothing")
    for name, arguments in also.items():
        parser.add_argument(name, **arguments)
    options = parser.parse_args(argv)
    # Runs and statistics of two models must not meet in one file.
    name = Path(options.model).name
    in_fp32 = "-cpu-fp32" if bf16_is_slow() else ""
    options.runs_file = options.runs_file or results_folder(name) / f"runs{in_fp32}.csv"
    options.cache = options.cache or ROOT / "runs" / ("study" if name == FIRST_MODEL else f"study-{name}")
    if not options.trace.is_dir():
        raise UserError(f"--trace {options.trace}: no such folder; expected TRACE's tasks, TASK/train.json each")
    unknown = set(options.names or ()) - {sweep.name for sweep in SWEEPS}
    if unknown:
        raise UserError(f"--names {'; '.join(sorted(unknown))}: not in the grid")
    return options


if __name__ == "__main__":
    run_command(main)
