"""What keeping costs: scaled steps, replay and divergence by step; choosing the mask by rows of the task.

python bench/keeping.py --trace FOLDER [--task FOMC --rows 8 32 128 512 --rounds 3]

FOLDER/TASK/train.json holds the rows, as TRACE has them; prompts keep 96 tokens and answers 32, as in the study. Each
setting is a run of the product's own command on one process: the mask of 1 % by ratio, in compact mode. The settings
take turns, round after round, so that a busy machine slows all of them; a ratio is the median over rounds. Prints two
tables and writes bench/results/keeping-<device>.csv, a row for each run.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench.record import device_name, write_rows
from piece_ds.checkpoint.mask_statistics import overlap, read_index
from piece_ds.cli.run import train
from piece_ds.config.settings import load_settings
from piece_ds.runtime.process import run_command

Row = dict[str, Any]

# Beside each batch of 8 rows: nothing, then what a flag adds. The mask alone is what the others are held against.
SETTINGS: dict[str, list[str]] = {
    "mask": [],
    "scaled steps": ["--step_scale", "general"],
    "replay at 0.25": ["--general_replay", "0.25"],
    "divergence 4 (2 rows)": ["--general_kl", "4"],
    "divergence 8, as many rows": ["--general_kl", "8", "--general_share", "1"],
    "recipe mask": ["--step_scale", "general", "--general_kl", "4"],
}
# Steps that are timed, after those that allocate.
NUM_STEPS, NUM_FIRST = 6, 2


def main(argv: list[str]) -> None:
    """Run every setting in every round, then every number of rows once."""
    options = _options(argv)
    rows: list[Row] = []
    path = Path(__file__).resolve().parent / "results" / f"keeping-{device_name()}.csv"
    with TemporaryDirectory() as folder:
        # General statistics are taken by the first run, and read by all others.
        kept = Path(folder) / "kept"
        for name in ("general statistics taken", "general statistics read"):
            rows.append(_run(name, 0, min(options.rows), [], options, kept))
        taken, read = (row["run_seconds"] for row in rows)
        print(f"general statistics, once for a base model: {taken - read:.0f} s more than reading them")

        # What a step costs.
        for number in range(options.rounds):
            for name, flags in SETTINGS.items():
                rows.append(_run(name, number, min(options.rows), flags, options, kept))
                write_rows(path, rows)
        _print_steps(rows)

        # What choosing the mask costs, from most rows to fewest: the mask of most rows is what others are held against.
        chosen = []
        for num_rows in sorted(options.rows, reverse=True):
            chosen.append(_run(f"{num_rows} rows", 0, num_rows, [], options, kept, Path(folder) / "most.safetensors"))
            write_rows(path, rows + chosen)
        _print_selection(chosen, options)


def _run(
    name: str,
    number: int,
    num_rows: int,
    flags: list[str],
    options: argparse.Namespace,
    kept: Path,
    reference: Path | None = None,
) -> Row:
    """Train a few steps; return seconds of the run, of a step and of selection.

    Args:
        name, number: of the setting and the round.
        num_rows: of the task's statistics.
        flags: what the setting adds.
        kept: folder of the model's text and its statistics, made by the first run.
        reference: mask file that the run's mask is held against; it becomes the run's own if there is none.
    """
    shared = {
        "deepspeed": "zero0",
        "bf16": True,
        "model_name_or_path": options.model,
        "task_dir": options.trace,
        "tasks": options.task,
        "max_prompt_len": 96,
        "max_ans_len": 32,
        "max_train_samples": options.max_train_samples,
        "max_eval_samples": 1,
        "method": "piece-ratio",
        "mask_ratio": 0.01,
        "importance_rows": num_rows,
        "general_text": "self",
        "general_statistics": kept,
        "max_steps": NUM_FIRST + NUM_STEPS,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "scorers": f"{options.task}=loss",
        "kl_tokens": 0,
        "save_model": "never",
        "output_dir": kept.parent / "run",
    }
    if not torch.cuda.is_available():
        shared["use_cpu"] = True
    shutil.rmtree(shared["output_dir"], ignore_errors=True)
    begin = time.perf_counter()
    train(load_settings([item for key, value in shared.items() for item in (f"--{key}", str(value))] + flags))
    seconds = time.perf_counter() - begin

    # What the run wrote of its steps, its selection and its mask.
    [task] = kept.parent.joinpath("run").glob("00-*")
    notes = [json.loads(line) for line in (task / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [note for note in notes if "loss" in note][NUM_FIRST:]
    [selection] = [note for note in notes if note.get("event") == "selection"]
    logits = [note for note in notes if note.get("event") == "base logits"]
    if reference is not None and not reference.exists():
        shutil.copyfile(task / "mask.safetensors", reference)
    return {
        "setting": name,
        "round": number,
        "importance_rows": num_rows,
        "batch_size": options.batch_size,
        "run_seconds": seconds,
        "step_seconds": statistics.median(step["train_seconds"] for step in steps),
        "tokens": statistics.mean(step["tokens"] for step in steps),
        "general_tokens": statistics.mean(step.get("general_tokens", 0) for step in steps),
        "host_peak_bytes": steps[-1].get("host_peak_bytes", ""),
        "base_logits_seconds": logits[0]["seconds"] if logits else "",
        "base_logits_bytes": logits[0]["bytes"] if logits else "",
        "statistics_seconds": selection["statistics_seconds"],
        "selection_seconds": selection["selection_seconds"],
        "overlap": "" if reference is None else _overlap(task / "mask.safetensors", reference),
    }


def _overlap(first: Path, second: Path) -> float:
    """Return the Jaccard index of two mask files."""
    return overlap(read_index(first)[0], read_index(second)[0])


def _print_steps(rows: list[Row]) -> None:
    """Print each setting's step beside that of the first setting in the same round."""
    plain = {row["round"]: row["step_seconds"] for row in rows if row["setting"] == "mask"}
    print(f"{'beside each batch':<28} step, of the mask's alone   tokens  general tokens")
    for name in SETTINGS:
        of_name = [row for row in rows if row["setting"] == name]
        ratio = statistics.median(row["step_seconds"] / plain[row["round"]] for row in of_name)
        tokens, general = (statistics.mean(row[key] for row in of_name) for key in ("tokens", "general_tokens"))
        print(f"{name:<28} {ratio:24.2f} {tokens:8.0f} {general:15.0f}")


def _print_selection(rows: list[Row], options: argparse.Namespace) -> None:
    """Print what the mask of each number of rows costs, in shares of an epoch, and shares with that of most rows."""
    num_rows = len(json.loads((options.trace / options.task / "train.json").read_text(encoding="utf-8")))
    epoch = statistics.median(row["step_seconds"] for row in rows) / options.batch_size * num_rows
    print(f"rows   statistics, s   selection, s   of an epoch of {num_rows} rows   overlap with the mask of most rows")
    for row in rows:
        share = (row["statistics_seconds"] + row["selection_seconds"]) / epoch
        seconds = f"{row['statistics_seconds']:13.1f} {row['selection_seconds']:14.1f}"
        print(f"{row['importance_rows']:<6} {seconds} {share:24.1%} {row['overlap']:24.2f}")


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--task", default="FOMC")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args(argv)
    options.max_train_samples = max(*options.rows, options.batch_size * (NUM_FIRST + NUM_STEPS))
    return options


if __name__ == "__main__":
    run_command(main)
