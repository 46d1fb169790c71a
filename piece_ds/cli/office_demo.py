"""The embedded default on a real model: office tasks, the recommended recipe and the methods it should beat.

All contenders learn the same rows in the same order for as many steps. Their learning rates are those at which they
learn about as much. The difference is what each does to the rest of the model: the loss on text that none of them has
seen.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import AutoTokenizer

from piece_ds.cli.run import train
from piece_ds.config.settings import OF_METHOD, Settings
from piece_ds.data.general_text import SELF
from piece_ds.deltas import compose, open_delta
from piece_ds.demo.office.recipe import CPU_RECIPE, SLOW_CPU_RECIPE, OfficeRecipe
from piece_ds.demo.office.write import OfficePaths, write_office
from piece_ds.evaluation.predictions import read_predictions
from piece_ds.models.pretrained import model_source
from piece_ds.report.grids import Grid, nats, percent, signed_nats
from piece_ds.report.results import RunResults
from piece_ds.report.table import print_grids
from piece_ds.runtime.distributed import broadcast_object, is_main, world_size
from piece_ds.runtime.files import write_whole
from piece_ds.runtime.processor import bf16_is_slow
from piece_ds.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

MODEL = "smollm2-135m"
# Longer answers are truncated in the examples shown, so that each stays on one line.
SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Contender:
    """One run of the comparison.

    Attributes:
        name: in tables and figures.
        folder: below the output folder; empty for the output folder itself.
        flags: settings that only this contender has.
    """

    name: str
    folder: str
    flags: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The results of the contenders.

    Attributes:
        runs: in the order of the comparison, each under the name of its contender.
        folders: their output folders.
        tasks: of the stream, in order.
    """

    runs: list[RunResults]
    folders: list[Path]
    tasks: tuple[str, ...]


def contenders(recipe: OfficeRecipe, material: Path) -> list[Contender]:
    """Return the contenders: the recommended recipe first, each method with and without divergence from the base model.

    Args:
        recipe: the settings.
        material: folder that keeps the base model's statistics of general text for all of them.
    """
    mask = {
        "method": "piece-ratio",
        "mask_ratio": recipe.mask_ratio,
        "learning_rate": recipe.mask_learning_rate,
        "importance_rows": recipe.importance_rows,
        "step_scale": "general",
        "general_text": SELF,
        "general_statistics": material / "general_statistics",
    }
    seqft = {"method": "seqft", "learning_rate": recipe.full_learning_rate}
    lora = {"method": "lora", "learning_rate": recipe.lora_learning_rate}
    divergence = {"general_text": SELF, "general_kl": recipe.general_kl, "general_share": recipe.general_share}
    every = [
        Contender("recommended", "", {**mask, **divergence}),
        Contender("recommended without KL", "without-kl", mask),
        Contender("seqft", "seqft", seqft),
        Contender("seqft + KL", "seqft-kl", {**seqft, **divergence}),
        Contender("lora", "lora", lora),
        Contender("lora + KL", "lora-kl", {**lora, **divergence}),
    ]
    return [contender for contender in every if contender.name not in recipe.leaves_out]


def run_office(
    settings: Settings,
    model: str,
    folder: RunFolder,
    recipe: OfficeRecipe | None = None,
) -> Comparison:
    """Run every contender over the stream; with --method or --recipe, only the user's own and seqft.

    Args:
        settings: the user's, which win over the recipe's. What they say of the method is for the first run alone.
        model: name or folder of the pretrained model.
        folder: free, or of the run to resume.
        recipe: the settings; None means the defaults, on a CPU with fewer tasks, rows and contenders.
    """
    # Write the data, and choose who takes part.
    recipe = recipe or _recipe_here()
    seed = settings.training_arguments().seed
    paths = _write(folder.root / "material", seed, model, recipe)
    common = _common_flags(paths, model, recipe, folder)
    chosen = _chosen(settings, contenders(recipe, folder.root / "material"), recipe)

    # Run one contender after another. All begin with the same model: it is judged once.
    runs = []
    for contender in chosen:
        where = folder.root / contender.folder
        own = {**contender.flags, "output_dir": where}
        if contender.folder:
            results = train(settings.without_method().rebuilt(common, own), compared_to=folder)[0]
        else:  # the user's own method and rate win
            results = train(settings.rebuilt({**common, **own}))[0]
        runs.append(replace(results, name=contender.name))
    return Comparison(runs, [folder.root / contender.folder for contender in chosen], recipe.tasks)


def _recipe_here() -> OfficeRecipe:
    """Return the settings for this machine: on a CPU what takes some ten minutes on two cores."""
    if bf16_is_slow():
        if is_main():
            logger.warning(
                "this processor has no AVX-512 and multiplies bf16 slowly: fp32, %d task and %d steps; elsewhere %d "
                "tasks of %d steps",
                *(len(SLOW_CPU_RECIPE.tasks), SLOW_CPU_RECIPE.task_steps),
                *(len(CPU_RECIPE.tasks), CPU_RECIPE.task_steps),
            )
        return SLOW_CPU_RECIPE
    return CPU_RECIPE if get_accelerator().device_name() == "cpu" else OfficeRecipe()


def print_comparison(comparison: Comparison) -> None:
    """Print what was learned and forgotten, draw it, and print some answers. Only rank 0 does anything."""
    if is_main():
        first = RunFolder(comparison.folders[0])
        print_grids([frontier_grid(comparison)])
        picture = first.root / "figures" / "frontier.png"
        write_whole(picture, lambda temporary: temporary.write_bytes(_frontier_picture(comparison)))
        print(f"figure: {picture}\n")
        print("\n".join(answers_before_and_after(comparison.runs[0].name, first, comparison.tasks)))


def _chosen(settings: Settings, known: list[Contender], recipe: OfficeRecipe) -> list[Contender]:
    """Return all contenders; with --method or --recipe, only the user's own and seqft."""
    own, named = settings.method.method, settings.method.recipe
    if "method" not in settings.given:
        # A name in the table must not promise what the user has changed.
        first = known[0]
        return [replace(first, name=f"{first.name}, changed"), *known[1:]] if settings.given & OF_METHOD else known

    # A known method keeps its tuned rate; another one gets that of full fine-tuning. A recipe has its own.
    flags = next((c.flags for c in known if c.flags["method"] == own), {"learning_rate": recipe.full_learning_rate})
    mine = Contender(own, "", flags) if named is None else Contender(f"recipe {named}", "", _beside_recipe(flags))
    return [mine, *(c for c in known if c.name == "seqft" != mine.name)]


def _beside_recipe(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of a contender that do not belong to its method: a recipe says all of it."""
    return {name: value for name, value in flags.items() if name not in OF_METHOD or name == "general_statistics"}


def _write(material: Path, seed: int, model: str, recipe: OfficeRecipe) -> OfficePaths:
    paths = (
        write_office(material, seed, AutoTokenizer.from_pretrained(model_source(model)), recipe) if is_main() else None
    )
    paths = broadcast_object(paths)
    assert isinstance(paths, OfficePaths)
    return paths


def _common_flags(paths: OfficePaths, model: str, recipe: OfficeRecipe, folder: RunFolder) -> dict[str, Any]:
    return {
        "model_name_or_path": model,
        "task_dir": paths.task_dir,
        "tasks": ",".join(recipe.tasks),
        "scorers": ",".join(f"{name}=exact" for name in recipe.tasks),
        "general_file": paths.general_file,
        "max_steps": recipe.task_steps,
        "per_device_train_batch_size": max(1, recipe.task_batch_size // world_size()),
        "per_device_eval_batch_size": 16,
        "importance_batch_size": recipe.importance_batch_size,
        "max_new_tokens_text": recipe.max_new_tokens,
        "lr_scheduler_type": "linear",
        "adam_beta2": recipe.adam_beta2,
        "save_model": "never",
        "logging_steps": 4,  # else 16 or 24 steps make no curve of the training loss
        **({"dtype": "float32"} if bf16_is_slow() else {}),
    }


def frontier_grid(comparison: Comparison) -> Grid:
    """Return what each run learned, what it did to the rest of the model, and how much it left on disk."""
    rows = []
    for run, folder in zip(comparison.runs, comparison.folders, strict=True):
        summary = run.matrix.summary()
        # One delta per task, so the mean is the price of keeping one task.
        deltas = sorted(folder.glob("[0-9][0-9]-*/delta.safetensors"))
        sizes, packed = [path.stat().st_size for path in deltas], [_packed_bytes(path) for path in deltas]
        rows.append(
            (
                run.name,
                percent(summary["score_learning"]),
                percent(summary["score_overall"]),
                signed_nats(summary["general_loss_change"]),
                nats(run.general_divergence),
                f"{mean(sizes) / 1e6:.1f} MB" if deltas else "-",
                f"{mean(packed) / 1e6:.1f} MB" if deltas else "-",
            )
        )
    header = ("run", "learned", "kept to the end", "general loss", "general KL", "delta of a task", "packed")
    return Grid("Learned against forgotten", header, tuple(rows))


def _packed_bytes(delta_file: Path) -> int:
    """Return the bytes of a delta in its smallest coding, as `piece_ds delta compose --coding smallest` writes it."""
    with TemporaryDirectory() as scratch:
        packed = Path(scratch) / "delta.safetensors"
        compose([open_delta(delta_file)], packed, coding="smallest")
        return packed.stat().st_size


def _frontier_picture(comparison: Comparison) -> bytes:
    """Return PNG bytes of the frontier, with one point per run.

    It shows accuracy right after each task against the rise of the loss on general text.
    """
    # matplotlib takes a second to import, on every rank; no other run draws this.
    from piece_ds.report.frontier import FrontierPoint, frontier_figure

    summaries = [(run.name, run.matrix.summary()) for run in comparison.runs]
    points = [
        FrontierPoint(name, "", summary["score_learning"] or 0.0, (summary["general_loss_change"],))
        for name, summary in summaries
    ]
    return frontier_figure(points, "learned", ["change of general loss (nats)"], y_are_losses=[True])


def answers_before_and_after(name: str, folder: RunFolder, tasks: tuple[str, ...]) -> list[str]:
    """Return the first held-out row of each task with its answers before the stream and after all of it."""
    lines = [f"What the model answers, before the stream and after all of it ({name}):"]
    last = f"{len(tasks) - 1:02d}-{tasks[-1]}"
    for task in tasks:
        prompts, golds, before = read_predictions(folder.predictions("before") / f"{task}.jsonl")
        after = read_predictions(folder.predictions(last) / f"{task}.jsonl")[2]
        lines += ["", f"  {prompts[0]}".replace("\n", "\n  ")]
        lines += [f"    before  {_shown(before[0])}", f"    after   {_shown(after[0])}", f"    right   {golds[0]}"]
    return lines


def _shown(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARACTERS else f"{flat[:SHOWN_CHARACTERS]} ..."
