"""One run of the experiment through the product's own path, and its row of runs.csv."""

import math
import shutil
import subprocess
import time
from datetime import date
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.continual.grid import MAIN_RATIO, Setting
from bench.continual.recipe import StreamRecipe
from bench.continual.resources import peak_memory_bytes, written_bytes, zero_peak_memory
from bench.continual.tasks import StreamFiles
from bench.record import device_name
from piece_ds.cli.run import train
from piece_ds.config.settings import Settings, load_settings
from piece_ds.data.general_rows import load_general
from piece_ds.data.image_collate import make_collator
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.evaluation.matrix import difference
from piece_ds.report.results import RunResults

CONFIG = Path(__file__).resolve().parents[2] / "ds_configs" / "zero0.json"


def run(setting: Setting, files: StreamFiles, recipe: StreamRecipe, recipe_hash: str, scratch: Path) -> dict[str, str]:
    """Make one run and return its row; scratch is emptied before and after.

    Raises:
        UserError: what train() refuses.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    zero_peak_memory()
    begin, written = time.perf_counter(), written_bytes()
    settings = settings_of(setting, files, recipe, scratch)
    results, folder = train(settings)
    seconds = time.perf_counter() - begin
    measured = {
        **_figures(results),
        **_cost(results),
        "total_seconds": seconds,
        "peak_rss_bytes": peak_memory_bytes(),
        "bytes_written": written_bytes() - written,
        "task_files_bytes": sum(path.stat().st_size for path in folder.root.glob("[0-9][0-9]-*/*.safetensors")),
    }
    if files.instructions_file is not None:
        last = folder.model(len(recipe.tasks) - 1, recipe.tasks[-1])
        measured["instructions_loss_before"] = _loss_on(files.base, files, recipe)
        measured["instructions_loss"] = _loss_on(last, files, recipe)
    shutil.rmtree(scratch)
    head = dict(zip(("method", "ratio", "rate", "seed"), setting.key, strict=True))
    return {**head, "recipe": recipe_hash, **{name: _text(value) for name, value in measured.items()}, **_facts()}


def settings_of(setting: Setting, files: StreamFiles, recipe: StreamRecipe, output_dir: Path) -> Settings:
    """The flags of a run, as launch/train.py would read them."""
    flags = {
        "deepspeed": CONFIG,
        "model_name_or_path": files.base,
        "task_dir": files.task_dir,
        "tasks": ",".join(recipe.tasks),
        "general_file": files.general_file,
        "max_prompt_len": recipe.max_prompt_len,
        "max_ans_len": recipe.max_ans_len,
        "method": setting.method,
        # Methods without a ratio of their own do not read it; it must be in range all the same.
        "mask_ratio": setting.ratio if setting.ratio < 1 else MAIN_RATIO,
        "importance_batch_size": recipe.importance_rows,
        "max_steps": recipe.steps,
        "per_device_train_batch_size": recipe.rows,
        "per_device_eval_batch_size": recipe.test_rows,
        "learning_rate": setting.rate,
        "lr_scheduler_type": recipe.lr_scheduler_type,
        "adam_beta2": recipe.adam_beta2,
        "scorers": recipe.scorers,
        "max_new_tokens": recipe.max_new_tokens,
        "max_new_tokens_text": recipe.max_new_tokens_text,
        "seed": setting.seed,
        "logging_steps": recipe.steps,
        "output_dir": output_dir,
    }
    if setting.method == "piece-ratio":
        flags["general_importance_file"] = files.importance_file
    argv = [item for name, value in flags.items() for item in (f"--{name}", str(value))]
    return load_settings([*argv, *setting.flags])


def _figures(results: RunResults) -> dict[str, float | int | None]:
    """What was learned and what was kept."""
    matrix = results.matrix
    found: dict[str, float | int | None] = {"selected": _selected(results)}
    for name, measure in (("loss", matrix.loss), ("score", matrix.score), ("accuracy", matrix.accuracy)):
        before = [value for value in measure.before or () if value is not None]
        found |= {
            f"{name}_before": sum(before) / len(before) if before else None,
            f"{name}_learned": measure.learning(),
            f"{name}_final": measure.overall(),
            f"{name}_backward_transfer": measure.backward_transfer(),
            f"{name}_forgetting": measure.forgetting(),
        }
    found["general_loss_before"], found["general_loss"] = matrix.general_loss_before, matrix.general_loss[-1]
    found["general_loss_change"] = difference(matrix.general_loss[-1], matrix.general_loss_before)
    for index, task in enumerate(matrix.tasks):
        for name, measure in (("loss", matrix.loss), ("score", matrix.score)):
            if measure.after[index][index] is not None:
                found[f"{name}_learned {task}"] = measure.after[index][index]
                found[f"{name}_final {task}"] = measure.after[-1][index]
    return found


def _selected(results: RunResults) -> int | None:
    """Weights that a task trains; None without a mask."""
    counts = list(results.selected_counts.values())
    return counts[-1][0] if counts else None


def _cost(results: RunResults) -> dict[str, float]:
    names = ("select_seconds", "train_seconds", "evaluate_seconds")
    return {name: sum(float(cost.get(name) or 0) for cost in results.cost.values()) for name in names}


def _loss_on(model_folder: Path, files: StreamFiles, recipe: StreamRecipe) -> float:
    """Nats per answer token of the instructions."""
    tokenizer = AutoTokenizer.from_pretrained(files.base)
    rows = load_general(str(files.instructions_file), tokenizer, recipe.max_prompt_len + recipe.max_ans_len)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    return evaluate_loss(model, rows, make_collator(tokenizer), recipe.test_rows, "cpu").mean


def _text(value: float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) or not math.isfinite(value) else f"{value:.6g}"


def _facts() -> dict[str, str]:
    """Where and with what; the commit is the last one of the product's own code."""
    command = ["git", "log", "-1", "--format=%h", "--", "piece_ds", "csrc"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=CONFIG.parent.parent).stdout.strip()
    return {"device": device_name(), "torch": torch.__version__, "commit": commit, "date": date.today().isoformat()}
