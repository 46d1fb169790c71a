"""The tables and the picture of the study, from results/runs.csv.

python bench/continual/real/summary.py [--model NAME] [--runs_file CSV] [--output FOLDER]

Writes summary.md (rise of general loss and KL at matched learning, per task; every run), frontier.png with all methods,
and recipes.png with those that the product advises beside what users run today.

Runs of other devices stand beside the file, in runs-DEVICE.csv. Every rise is measured from the base model on the
run's own device, so rows of all devices that train in bf16 stand in one table. A setting made on several counts once:
the row of the device that has made more rates of its curve, so that a curve is of one device where one has made it
whole, and at equal numbers the row of runs.csv. All rows of such settings are in a table of their own, which says how
far devices differ. Runs in fp32 have a section of their own, where they are held against each other.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from bench.continual.frontier import Point, levels, matched, useful_points, why_not
from bench.continual.real.grid import SWEEPS, settings_in_order
from bench.continual.real.pictures import frontier_figure, recipes_figure
from bench.continual.real.run import FIRST_MODEL, FP32, results_folder
from bench.continual.real.runs import (
    Record,
    curves_of,
    each_once,
    files_of_devices,
    made_twice,
    read_runs,
    tasks_of,
)
from piece_ds.runtime.files import write_text, write_whole

SHARES = (0.975, 0.985, 0.995)

# What every run is held against, at what it has learned.
REFERENCES = ("full", "LoRA", "full + KL")


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=FIRST_MODEL, help="as run.py was given it")
    parser.add_argument("--runs_file", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    name = Path(options.model).name
    runs_file = options.runs_file or results_folder(name) / "runs.csv"
    output = options.output or results_folder(name)
    devices = [read_runs(path) for path in files_of_devices(runs_file)]
    runs = each_once([of_device for of_device in devices if not _is_fp32(of_device)])
    in_fp32 = each_once([of_device for of_device in devices if _is_fp32(of_device)])
    if not runs:
        sys.exit(f"{runs_file} has no runs: bench/continual/real/run.py makes them")
    write_text(output / "summary.md", summary_page(runs, name, made_twice(devices), in_fp32))
    for picture, figure in (("frontier.png", frontier_figure(runs)), ("recipes.png", recipes_figure(runs))):
        write_whole(output / picture, partial(figure.savefig, format="png", dpi=130))
    print(f"written to {output}: summary.md, frontier.png, recipes.png ({len(runs)} runs, {len(in_fp32)} in fp32)")


def _is_fp32(runs: list[Record]) -> bool:
    return all(run["device"].endswith(FP32) for run in runs)


def summary_page(
    runs: list[Record],
    model: str = FIRST_MODEL,
    repeated: Sequence[list[Record]] = (),
    in_fp32: Sequence[Record] = (),
) -> str:
    """Return the page: tables at matched learning for each task, then every run.

    Args:
        runs: one row a setting.
        model: the name of it.
        repeated: all rows of each setting that several devices have made.
        in_fp32: one row a setting made in fp32.
    """
    planned = len(settings_in_order())
    seeds = sorted({run["seed"] for run in runs})
    text = [
        f"# Learned against lost, on {'SmolLM2-135M-Instruct' if model == FIRST_MODEL else model}",
        f"{len(runs)} of the {planned} runs of the grid are made (seeds {', '.join(seeds)}), and {len(in_fp32)} in "
        "fp32; no other was started.",
        "Learned: loss on held-out answers, nats per token. Lost: mean rise of the loss on three texts no method saw, "
        "and KL(base || tuned) on them, nats per token. Levels are shares of the way from the untrained loss to the "
        "best that any method learned. 'passed': the smallest rate had learned more already.",
    ]
    for task in tasks_of(runs):
        of_task = [run for run in runs if run["task"] == task]
        before = float(of_task[0]["learned_before"])
        best = min(float(run["learned"]) for run in of_task)
        wanted = levels(before, best, SHARES)
        text.append(f"## {task}: {before:.3f} before, {best:.3f} at best")
        heads = [
            f"{kind} at {share:.1%} ({level:.3f})"
            for kind in ("rise", "KL")
            for share, level in zip(SHARES, wanted, strict=True)
        ]
        text.append(
            "\n".join(
                ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads), *_rows(of_task, wanted)]
            )
        )
    text.append("## Each run beside others that have learned as much")
    text.append(
        "A row is one run, and the rise of full fine-tuning and of LoRA where they have learned as much. Rates above "
        "that at which a method learns most are left out. 'x 3.0': so many times the run's own rise."
    )
    text.append(_beside_references(runs))
    if in_fp32:
        text.append("## In fp32")
        text.append("The same, on a processor that multiplies bf16 slowly: held against runs in fp32 alone.")
        text.append(_beside_references(list(in_fp32)))
    if repeated:
        text.append("## The same setting on several devices")
        text.append(_on_devices(repeated))
    text.append("## Every run")
    text.append(_every_run([*runs, *in_fp32]))
    return "\n\n".join(text) + "\n"


def _rows(runs: list[Record], wanted: list[float]) -> list[str]:
    rows = []
    for sweep in SWEEPS:
        cells = []
        for lost in ("rise", "kl"):
            curves = curves_of(runs, sweep.name, lost)
            if not curves:
                continue
            cells += [_cell(curves, level) for level in wanted]
        if cells:
            rows.append(f"| {sweep.name} | " + " | ".join(cells) + " |")
    return rows


def _cell(curves: list[list[Point]], level: float) -> str:
    found, missing = matched(curves, level)
    if found is None:
        return why_not(curves, level)
    spread = f" ± {found.half_width:.3f}" if len(curves) - missing > 1 else ""
    return f"{found.mean:+.3f}{spread}"


def _beside_references(runs: list[Record]) -> str:
    head = "| task | seed | method | rate | learned | rise | "
    lines = [head + " | ".join(REFERENCES) + " |", "|---|---:|---|" + "---:|" * 6]
    # Within a seed: seeds train in other orders, and reach other losses.
    for task, seed in ((task, seed) for task in tasks_of(runs) for seed in sorted({run["seed"] for run in runs})):
        of_task = [run for run in runs if (run["task"], run["seed"]) == (task, seed)]
        curves = {name: curves_of(of_task, name, "rise") for name in REFERENCES}
        for sweep in SWEEPS:
            for curve in curves_of(of_task, sweep.name, "rise"):
                for point in useful_points(curve):
                    cells = [_reference(curves[name], point) if name != sweep.name else "-" for name in REFERENCES]
                    own = f"{task} | {seed} | {sweep.name} | {point.rate:g} | {point.learned:.3f} | {point.lost:+.3f}"
                    lines.append(f"| {own} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reference(curves: list[list[Point]], point: Point) -> str:
    if not curves:
        return "not run"
    found, _ = matched(curves, point.learned)
    if found is None:
        return why_not(curves, point.learned)
    # A factor of two signs, or of nothing, says nothing.
    return f"{found.mean:+.3f}" + (f" (x {found.mean / point.lost:.1f})" if point.lost > 0 and found.mean > 0 else "")


def _on_devices(repeated: Sequence[list[Record]]) -> str:
    lines = ["| method | task | rate | seed | device | learned | rise | KL |", "|---|---|---:|---:|---|---:|---:|---:|"]
    for run in (run for runs in repeated for run in runs):
        own = " | ".join(run[name] for name in ("name", "task", "rate", "seed", "device"))
        lines.append(f"| {own} | {float(run['learned']):.3f} | {float(run['rise']):+.3f} | {float(run['kl']):.3f} |")
    return "\n".join(lines)


def _every_run(runs: list[Record]) -> str:
    columns: dict[str, Callable[[Record], str]] = {
        "method": lambda run: run["name"],
        "task": lambda run: run["task"],
        "rate": lambda run: run["rate"],
        "seed": lambda run: run["seed"],
        "device": lambda run: run["device"],
        "learned": lambda run: f"{float(run['learned']):.3f}",
        "rise": lambda run: f"{float(run['rise']):+.3f}",
        "KL": lambda run: f"{float(run['kl']):.3f}",
        "delta, MB": lambda run: f"{float(run['delta_bytes']) / 1e6:.1f}",
        "seconds": lambda run: f"{float(run['seconds']):.0f}",
    }
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(cell(run) for cell in columns.values()) + " |" for run in runs]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
