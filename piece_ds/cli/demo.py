"""The embedded default: a stream of small tasks on a real model, or on a small model that is made here.

The real model comes from a package index (office_demo.py). Without an index, a model of 0.4 million weights is made and
trained first. Then PIECE is compared with plain fine-tuning on it. Either way everything goes the way of a user's own
model and data: files, launch settings, the same engine.
"""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from piece_ds.cli.office_demo import MODEL, Comparison, run_office
from piece_ds.cli.run import train
from piece_ds.config.defaults import timeout_seconds
from piece_ds.config.settings import Settings
from piece_ds.data.files import load_rows
from piece_ds.data.image_collate import make_collator
from piece_ds.data.tokenize import Encoder, tokenize_rows
from piece_ds.demo.recipe import EmbeddedRecipe
from piece_ds.demo.write import EmbeddedPaths, write_embedded
from piece_ds.models.loading import load_model
from piece_ds.models.pretrained import NotFetched, fetch
from piece_ds.preflight.checks import check_kernels, resumes_from
from piece_ds.report.results import RunResults
from piece_ds.runtime.distributed import barrier, broadcast_object, is_main, world_size
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.process import start_distributed
from piece_ds.training.reporters import open_reporters
from piece_ds.training.run_folder import RunFolder
from piece_ds.training.task import release
from piece_ds.training.trainer import TaskTrainer

logger = logging.getLogger(__name__)

# --model_name_or_path embedded: use the small model that is made here, even if a package index has a real one.
EMBEDDED = "embedded"
DEFAULT_OUTPUT = "runs/embedded"


def run_embedded(settings: Settings) -> tuple[list[RunResults], RunFolder, Comparison | None]:
    """Run the comparison on a real model or, if no package index has it, on a small model made here.

    Args:
        settings: the user's, which win over the recipe's. With model_name_or_path EMBEDDED nothing is fetched.
    Returns:
        The runs and the output folder; for a real model also the comparison of the runs, else None.
    Raises:
        UserError: data is named without a model, or settings cannot be used.
    """
    if settings.data.train_file or settings.data.task_dir:
        raise UserError("data without a model: add --model_name_or_path M")

    # Check what can be checked before minutes of training.
    start_distributed(timeout_seconds(settings.flag("ddp_timeout")))
    arguments = settings.training_arguments()
    check_kernels(settings.method.method, arguments)
    resume = resumes_from(arguments)
    folder = RunFolder(Path(arguments.output_dir) if "output_dir" in settings.given else _default_folder(resume))
    open_reporters(arguments.report_to, folder.root)  # raises if one is not installed
    folder.require_free(resume, settings.output.overwrite_output_dir)

    # Rank 0 fetches; all ranks learn whether it could.
    if settings.model.model_name_or_path != EMBEDDED and _has_real_model():
        comparison = run_office(settings, MODEL, folder)
        return comparison.runs, folder, comparison
    return _run_small(settings, folder, arguments.seed), folder, None


def _has_real_model() -> bool:
    """Return whether rank 0 has MODEL in its cache or could fetch it. If not, log why."""
    reason = None
    if is_main():
        try:
            fetch(MODEL)
        except NotFetched as error:
            reason = str(error)
            logger.warning("%s. Going on with the small model that is made here", error)
    return broadcast_object(reason) is None


def _run_small(settings: Settings, folder: RunFolder, seed: int) -> list[RunResults]:
    """Make the base model, run the method over the stream, then sequential fine-tuning for comparison."""
    recipe = EmbeddedRecipe()
    base = folder.root / "base"
    # Only a folder that holds a run is ours to clear.
    if settings.output.overwrite_output_dir and is_main() and folder.run_file.exists():
        shutil.rmtree(base, ignore_errors=True)  # it may be of another seed
    barrier()

    # Write the data, and train the base unless an interrupted run left it.
    paths = _write(folder.root / "material", seed, recipe)
    if not (base / "config.json").is_file():
        _train_base(base, paths, recipe, settings)

    # Run the method that was asked for, then the baseline, which takes nothing that was said of the method. Both begin
    # with the same model: it is judged once.
    runs: list[RunResults] = []
    for method, where, rate in (
        (None, folder.root, recipe.mask_learning_rate),
        ("seqft", folder.root / "seqft", recipe.full_learning_rate),
    ):
        recipe_flags = {**_stream_flags(paths, recipe, base), "learning_rate": rate, "output_dir": where}
        chosen: dict[str, Any] = {"method": method, "output_dir": where} if method else {}
        if settings.model.model_name_or_path == EMBEDDED:
            chosen["model_name_or_path"] = base
        own = settings.without_method() if method else settings
        runs.append(train(own.rebuilt(recipe_flags, chosen), compared_to=folder if runs else None)[0])
        if settings.method.method == "seqft" and settings.method.recipe is None:  # it is the baseline
            break
    return runs


def _default_folder(resume: bool) -> Path:
    """Return runs/embedded, or that name with the first number that is free; the same on every rank.

    A run that is to be resumed is in the last of them that is not free.
    """
    candidates = [Path(DEFAULT_OUTPUT), *(Path(f"{DEFAULT_OUTPUT}-{n}") for n in range(2, 1000))]
    free = next(number for number, path in enumerate(candidates) if not path.exists())
    return Path(str(broadcast_object(candidates[max(0, free - 1) if resume else free])))


def _write(material: Path, seed: int, recipe: EmbeddedRecipe) -> EmbeddedPaths:
    paths = broadcast_object(write_embedded(material, seed, recipe) if is_main() else None)
    assert isinstance(paths, EmbeddedPaths)
    return paths


def _train_base(base: Path, paths: EmbeddedPaths, recipe: EmbeddedRecipe, settings: Settings) -> None:
    """Train every weight of the untrained model on the base material, and save it as a transformers folder."""
    arguments = settings.training_arguments(
        output_dir=base,
        max_steps=recipe.base_steps,
        per_device_train_batch_size=_per_rank(recipe.base_batch_size),
        learning_rate=recipe.base_learning_rate,
        warmup_steps=recipe.base_warmup_steps,
        lr_scheduler_type="cosine",
        adam_beta2=recipe.adam_beta2,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
    )
    logger.warning("training the base model: %d steps", recipe.base_steps)

    # The rows, the model and the trainer.
    tokenizer = AutoTokenizer.from_pretrained(paths.model_dir)
    encoder = Encoder(tokenizer, recipe.max_prompt_length + recipe.max_answer_length)
    rows = tokenize_rows(load_rows(str(paths.base_train_file)), encoder, str(paths.base_train_file))
    model_settings = type(settings.model)(model_name_or_path=str(paths.model_dir))
    model = load_model(model_settings, torch.float32)
    trainer = TaskTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=make_collator(tokenizer),
        processing_class=tokenizer,
    )

    # Train it, and free the memory before the stream begins.
    trainer.train()
    trainer.save_model(str(base))
    release(trainer)
    barrier()


def _stream_flags(paths: EmbeddedPaths, recipe: EmbeddedRecipe, base: Path) -> dict[str, Any]:
    """Return the recipe as flags of the stream."""
    return {
        "model_name_or_path": base,
        "task_dir": paths.task_dir,
        "tasks": ",".join(paths.task_names),
        "general_file": paths.general_file,
        "max_prompt_len": recipe.max_prompt_length,
        "max_ans_len": recipe.max_answer_length,
        "max_new_tokens": recipe.max_new_tokens,
        "mask_ratio": recipe.mask_ratio,
        "importance_batch_size": recipe.importance_batch_size,
        "max_steps": recipe.task_steps,
        "per_device_train_batch_size": _per_rank(recipe.task_batch_size),
        "per_device_eval_batch_size": 64,
        "lr_scheduler_type": "linear",
        "adam_beta2": recipe.adam_beta2,
    }


def _per_rank(batch_size: int) -> int:
    return max(1, batch_size // world_size())
