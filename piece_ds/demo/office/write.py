"""Write the office tasks and the general text to evaluate on, as the files that a user would bring."""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from transformers import PreTrainedTokenizerBase

from piece_ds.data.general_text import builtin_rows
from piece_ds.data.tokenize import Encoder
from piece_ds.demo.office import OFFICE_TASKS
from piece_ds.demo.office.recipe import OfficeRecipe
from piece_ds.demo.tasks import draw_rows, write_json, write_jsonl


@dataclass(frozen=True)
class OfficePaths:
    """The files that write_office() wrote.

    Attributes:
        task_dir: folder of NAME/{train,test}.json.
        general_file: JSONL of encoded rows of text that no task trains.
    """

    task_dir: Path
    general_file: Path


def write_office(folder: Path, seed: int, tokenizer: PreTrainedTokenizerBase, recipe: OfficeRecipe) -> OfficePaths:
    """Write the material to folder: the same bytes for the same seed, recipe, tokenizer and Python installation.

    Call it in one process.

    Args:
        folder: made if missing. Files of the same names are overwritten.
        seed: of every choice.
        tokenizer: of the model that will be evaluated on the general text.
        recipe: sizes.
    Returns:
        The paths written.
    """
    paths = OfficePaths(folder / "tasks", folder / "general.jsonl")
    for name in recipe.tasks:
        num_rows = recipe.num_train_rows + recipe.num_test_rows
        rows = draw_rows(OFFICE_TASKS[name], num_rows, Random(f"{seed}/{name}"))
        write_json(rows[: recipe.num_train_rows], paths.task_dir / name / "train.json")
        write_json(rows[recipe.num_train_rows :], paths.task_dir / name / "test.json")

    # The general text is encoded here, so that all rows have the same length.
    encoder = Encoder(tokenizer, cutoff=recipe.general_tokens)
    general = builtin_rows(encoder, recipe.num_general_rows, recipe.general_tokens, seed)
    write_jsonl((dict(row) for row in general), paths.general_file)
    return paths
