"""The embedded example with images: for each small vision-language model a base, then PIECE on two tasks.

The base is made with `--method seqft --eligible '*vis*'`, which also trains the vision tower. The tasks are then
trained like a user's own.
"""

from pathlib import Path
from typing import Any

from piece_ds.cli.run import train
from piece_ds.config.defaults import timeout_seconds
from piece_ds.config.settings import Settings, load_settings, print_help
from piece_ds.demo.vision.models import FAMILIES, write_model
from piece_ds.demo.vision.tasks import BASE, TASKS, words, write_task
from piece_ds.methods.registry import methods_help
from piece_ds.report.results import RunResults
from piece_ds.report.run_page import write_report
from piece_ds.report.table import print_results
from piece_ds.runtime.distributed import barrier, is_main, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.process import start_distributed
from piece_ds.training.run_folder import RunFolder

DEFAULT_OUTPUT = "runs/vqa"
BATCH_SIZE = 32  # rows of a step, over all ranks
BASE_STEPS, BASE_RATE, BASE_ROWS = 700, 2e-3, 4096
# 10 %, as in the other embedded example: 0.1 % of such a small model is about 300 weights.
TASK_STEPS, TASK_RATE, TASK_ROWS, MASK_RATIO = 150, 1e-3, 1024, 0.1
NUM_JUDGED = 128


def main(argv: list[str]) -> None:
    """Run launch/vqa_demo.py."""
    if "-h" in argv or "--help" in argv:
        print_help({"method": methods_help()})
        return
    settings = load_settings(argv)
    if settings.model.model_name_or_path or settings.data.train_file or settings.data.task_dir:
        raise UserError("this example makes its models and data itself; launch/train.py takes yours")

    # Refuse what would be overwritten, before minutes of training.
    start_distributed(timeout_seconds(settings.flag("ddp_timeout")))
    root = Path(settings.flag("output_dir") or DEFAULT_OUTPUT)
    RunFolder(root).require_free(resume=False)

    # Write models and data once, then train each family.
    material = root / "material"
    seed = settings.training_arguments(output_dir=root).seed
    if is_main():
        write_material(material, seed)
    barrier()
    for family in FAMILIES:
        _train_base(settings, material, family)
        results, folder = _train_tasks(settings, material, family, root / family)
        if is_main():
            print(f"== {family}")
            print_results([results])
            print(f"report: {write_report(folder.root, [results])}")


def write_material(material: Path, seed: int) -> None:
    """Write untrained models, the base's questions and the tasks, with their drawings."""
    for family in FAMILIES:
        write_model(family, material / family / "untrained", seed, words())
    write_task(BASE, material / "base", {"train": BASE_ROWS, "test": NUM_JUDGED}, f"{seed}/base")
    for name, question in TASKS.items():
        sizes = {"train": TASK_ROWS, "test": NUM_JUDGED}
        write_task({name: question}, material / "tasks" / name, sizes, f"{seed}/{name}")


def _train_base(settings: Settings, material: Path, family: str) -> None:
    flags = {
        "model_name_or_path": material / family / "untrained",
        "train_file": material / "base" / "train.json",
        "eval_file": material / "base" / "test.json",
        "method": "seqft",
        "eligible": "*vis*",
        "max_steps": BASE_STEPS,
        "learning_rate": BASE_RATE,
        "output_dir": material / family / "base",
    }
    # What the user says of the method, and of what it may select, is for the tasks.
    fixed = {name: flags[name] for name in ("method", "eligible")}
    train(_with_recipe(settings.without_method(), flags, fixed))


def _train_tasks(settings: Settings, material: Path, family: str, output: Path) -> tuple[RunResults, RunFolder]:
    flags = {
        "model_name_or_path": material / family / "base" / "00-train" / "model",
        "task_dir": material / "tasks",
        "tasks": ",".join(TASKS),
        "general_file": material / "base" / "test.json",
        "mask_ratio": MASK_RATIO,
        "importance_batch_size": 16,
        "max_steps": TASK_STEPS,
        "learning_rate": TASK_RATE,
        "output_dir": output,
    }
    return train(_with_recipe(settings, flags))


def _with_recipe(settings: Settings, flags: dict[str, Any], fixed: dict[str, Any] | None = None) -> Settings:
    """Return the recipe's flags, overridden by the user's, overridden by the folder and by what is fixed."""
    shared = {
        "per_device_train_batch_size": max(1, BATCH_SIZE // world_size()),
        "per_device_eval_batch_size": 64,
        "max_new_tokens": 8,
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
        "adam_beta2": 0.95,
    }
    return settings.rebuilt({**shared, **flags}, {"output_dir": flags["output_dir"], **(fixed or {})})
