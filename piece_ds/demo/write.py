"""Write the embedded model, its base material and the task stream to a folder, as ordinary files."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from piece_ds.demo.corpus import draw_text_rows, source_files, split_files
from piece_ds.demo.model import MAX_LENGTH, make_model, make_tokenizer
from piece_ds.demo.recipe import EmbeddedRecipe
from piece_ds.demo.tasks import SKILLS, TASKS, Row, draw_rows, skill_maker, write_json, write_jsonl


@dataclass(frozen=True)
class EmbeddedPaths:
    """The files that write_embedded() wrote.

    Attributes:
        model_dir: transformers folder with the untrained model and its tokenizer.
        base_train_file: JSONL rows that make it a base model: source text and base skills, shuffled.
        general_file: JSONL rows of held-out source text, which neither the base nor any task trains.
        task_dir: folder of NAME/{train,eval,test}.json.
        task_names: names of the tasks, in the order of the stream.
    """

    model_dir: Path
    base_train_file: Path
    general_file: Path
    task_dir: Path
    task_names: tuple[str, ...]


def write_embedded(folder: Path, seed: int, recipe: EmbeddedRecipe | None = None) -> EmbeddedPaths:
    """Write the embedded default to folder: the same bytes for the same seed, recipe and Python installation.

    Args:
        folder: made if missing. Files of the same names are overwritten.
        seed: of the initial weights and of every random choice.
        recipe: sizes of the data; None means the defaults.
    Returns:
        The paths written.
    Raises:
        RuntimeError: the Python installation carries no sources.
    Cost: a few seconds and about 10 MB, mostly for reading the standard library. Call it in one process.
    """
    recipe = recipe or EmbeddedRecipe()
    paths = EmbeddedPaths(
        model_dir=folder / "untrained",
        base_train_file=folder / "base.jsonl",
        general_file=folder / "general.jsonl",
        task_dir=folder / "tasks",
        task_names=tuple(TASKS),
    )

    # The untrained model.
    make_model(seed).save_pretrained(paths.model_dir)
    make_tokenizer(MAX_LENGTH).save_pretrained(paths.model_dir)

    # What the base learns, and the text that measures forgetting.
    base_rows, general_rows = _base_material(seed, recipe)
    write_jsonl(base_rows, paths.base_train_file)
    write_jsonl(general_rows, paths.general_file)

    # The tasks.
    for name in paths.task_names:
        for split, rows in _task_splits(name, seed, recipe).items():
            write_json(rows, paths.task_dir / name / f"{split}.json")
    return paths


def _base_material(seed: int, recipe: EmbeddedRecipe) -> tuple[list[Row], list[Row]]:
    # Each part has a generator of its own, so that a change of one part leaves the others as they are.
    random = Random(f"{seed}/base")
    learned, held_out = split_files(source_files(), random)
    num_text_rows = int(recipe.num_base_rows * recipe.text_share)
    rows = draw_text_rows(learned, num_text_rows, recipe.text_bytes, random)
    num_skill_rows = (recipe.num_base_rows - num_text_rows) // len(SKILLS)
    for name in SKILLS:
        make_row = skill_maker(name)
        rows += [make_row(random) for _ in range(num_skill_rows)]
    random.shuffle(rows)
    return rows, draw_text_rows(held_out, recipe.num_general_rows, recipe.text_bytes, random)


def _task_splits(name: str, seed: int, recipe: EmbeddedRecipe) -> dict[str, list[Row]]:
    sizes = {"train": recipe.num_train_rows, "eval": recipe.num_eval_rows, "test": recipe.num_test_rows}
    rows = iter(draw_rows(TASKS[name], sum(sizes.values()), Random(f"{seed}/{name}")))
    return {split: [next(rows) for _ in range(size)] for split, size in sizes.items()}
