"""The task stream: which rows are learned in which order, and which rows each task is judged on."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from piece_ds.config import DataArguments
from piece_ds.errors import UserError, nearest
from piece_ds.stream.encode import Encoder, split_prompt
from piece_ds.stream.files import first_rows, load_rows
from piece_ds.stream.readers import READERS
from piece_ds.stream.tokenize import tokenize_rows

# A task that comes with training rows alone is judged on its first rows, so that its column is not empty;
# Task.held_out says so. More of them would only tell the same about rows the model has seen.
NUM_TRAINING_ROWS_JUDGED = 256


@dataclass(frozen=True)
class Task:
    """One task of the stream, tokenized.

    Attributes:
        name: folder name, or the file's stem.
        train, eval, test: columns input_ids and labels. eval is for the loss during training, test for the result
            matrix; where a file is absent the other stands in, and where both are, the first training rows.
        answers: the gold answers of test, as text, in its order.
        prompt_texts: the prompts of test, as text, in its order.
        held_out: whether test holds rows other than the training file's.
    """

    name: str
    train: datasets.Dataset
    eval: datasets.Dataset
    test: datasets.Dataset
    answers: list[str] = field(repr=False)
    prompt_texts: list[str] = field(repr=False)
    held_out: bool = True

    def prompts(self) -> list[list[int]]:
        """Token ids to generate an answer from, for each row of test, in its order."""
        return [split_prompt(row["input_ids"], row["labels"])[0] for row in self.test]


def load_task_stream(arguments: DataArguments, tokenizer: PreTrainedTokenizerBase) -> list[Task]:
    """The tasks that --train_file, or --task_dir and --tasks, name, in order.

    Args:
        arguments: checked settings; one of train_file and task_dir is set.
        tokenizer: the model's.
    Raises:
        UserError: no data named, an unknown or repeated task, or a file that cannot be used.
    """
    encoder = Encoder(tokenizer, arguments.cutoff, arguments.chat_template)
    return [
        _load_task(name, files, encoder, arguments.max_eval_samples) for name, files in _task_files(arguments).items()
    ]


def _task_files(arguments: DataArguments) -> dict[str, dict[str, str]]:
    """Task name -> split -> path or Hub name, in the order of the stream."""
    if arguments.train_file:
        files = {"train": arguments.train_file}
        if arguments.eval_file:
            files["eval"] = arguments.eval_file
        return {Path(arguments.train_file.split(":")[0]).stem: files}
    if not arguments.task_dir or not arguments.tasks:
        raise UserError("no training data: give --train_file, or --task_dir with --tasks")
    return {
        name: _files_in(Path(arguments.task_dir) / name) for name in _task_names(arguments.tasks, arguments.task_dir)
    }


def _task_names(tasks: str, task_dir: str) -> list[str]:
    names = [name.strip() for name in tasks.split(",")]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if "" in names or repeated:
        what = f"{repeated!r} twice" if repeated else "an empty name"
        raise UserError(f"--tasks {tasks!r} holds {what}; name each task once, separated by commas")
    if not Path(task_dir).is_dir():
        raise UserError(f"--task_dir {task_dir}: no such folder")
    known = sorted(entry.name for entry in Path(task_dir).iterdir() if entry.is_dir())
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks: no task {name!r} in {task_dir}; it has {', '.join(known)}.{nearest(name, known)}"
            )
    return names


def _files_in(folder: Path) -> dict[str, str]:
    """Split -> file of a task's folder, the first known suffix that exists; train.json where none does."""
    found = {}
    for split in ("train", "eval", "test"):
        paths = [folder / f"{split}{suffix}" for suffix in READERS]
        path = next((path for path in paths if path.exists()), None)
        if path or split == "train":
            found[split] = str(path or paths[0])
    return found


def _load_task(name: str, files: dict[str, str], encoder: Encoder, max_eval_samples: int | None) -> Task:
    rows = {split: load_rows(path) for split, path in files.items()}
    limits = {"train": None, "eval": max_eval_samples, "test": max_eval_samples}
    splits = {split: tokenize_rows(first_rows(rows[split], limits[split]), encoder, files[split]) for split in files}
    held_out = len(files) > 1
    judged = splits["train"] if held_out else first_rows(splits["train"], max_eval_samples or NUM_TRAINING_ROWS_JUDGED)
    test_split = "test" if "test" in files else "eval" if "eval" in files else "train"
    test = splits[test_split] if held_out else judged
    prompt_texts, answers = _texts(first_rows(rows[test_split], len(test)), encoder)
    return Task(
        name=name,
        train=splits["train"],
        eval=splits.get("eval", test),
        test=test,
        answers=answers,
        prompt_texts=prompt_texts,
        held_out=held_out,
    )


def _texts(rows: datasets.Dataset, encoder: Encoder) -> tuple[list[str], list[str]]:
    """Prompts and gold answers as text; for rows of token ids, what these decode to."""
    if "answer" in rows.column_names:
        return list(rows["prompt"]), list(rows["answer"])
    prompts, answers = zip(*(split_prompt(row["input_ids"], row["labels"]) for row in rows), strict=True)

    def decode(many: Iterable[list[int]]) -> list[str]:
        return [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in many]

    return decode(prompts), decode(answers)
