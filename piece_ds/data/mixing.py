"""Mix the rows of several files into the training rows of one task: one after another, or drawn with weights."""

from collections.abc import Sequence
from pathlib import Path

import datasets

from piece_ds.runtime.errors import UserError


def split_files(text: str) -> list[str]:
    """Return the files that --train_file names: one, or several with commas between them.

    Raises:
        UserError: a name is empty or stands twice.
    """
    # A file may have a comma in its name.
    try:
        is_one = "," not in text or Path(text).exists()
    except (OSError, ValueError):  # several names together may be too long for one
        is_one = False
    if is_one:
        return [text]
    names = [name.strip() for name in text.split(",")]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if "" in names or repeated is not None:
        what = "an empty name" if "" in names else f"{repeated!r} twice"
        raise UserError(f"--train_file {text!r} holds {what}; name each file once, separated by commas")
    return names


def parse_probs(text: str | None, num_files: int) -> list[float] | None:
    """Return the share of each file's rows, from --interleave_probs such as 0.7,0.3; None without it.

    Raises:
        UserError: they are no positive numbers, or not as many as files.
    """
    if text is None:
        return None
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"--interleave_probs expects positive numbers such as 0.7,0.3, got {text!r:.80}")
    if len(weights) != num_files or num_files < 2:
        raise UserError(f"--interleave_probs has {len(weights)} numbers for {num_files} files of --train_file")
    return [weight / sum(weights) for weight in weights]


def mixed(
    rows: Sequence[datasets.Dataset], probs: Sequence[float] | None, stopping: str, seed: int
) -> datasets.Dataset:
    """Return the rows of several data sets as one.

    Args:
        rows: at least one, encoded.
        probs: share of each; None lays them one after another.
        stopping: with probs, 'first_exhausted' ends with the first set that has no row left, 'all_exhausted' with the
            last one; the others' rows then come again.
        seed: of the draw, which is the same on every rank and in every run.
    """
    if len(rows) == 1:
        return rows[0]
    if probs is None:
        return datasets.concatenate_datasets(list(rows))
    return datasets.interleave_datasets(list(rows), list(probs), seed=seed, stopping_strategy=stopping)
