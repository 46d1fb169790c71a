"""The task stream: which rows are learned in which order, and which rows each task is evaluated on."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
from transformers import ProcessorMixin

from piece_ds.config.arguments import DataArguments
from piece_ds.data.files import first_format, first_rows
from piece_ds.data.formats import parse_columns
from piece_ds.data.held_out import hold_out
from piece_ds.data.image_rows import ImagePrompt
from piece_ds.data.mixing import mixed, parse_probs, split_files
from piece_ds.data.readers import READERS
from piece_ds.data.rows import TEXT, TOKENS
from piece_ds.data.task_reader import TaskReader
from piece_ds.data.tokenize import Encoder, split_prompt
from piece_ds.models.processor import Processing, tokenizer_of
from piece_ds.models.token_ids import TokenIds
from piece_ds.runtime.errors import UserError, nearest

logger = logging.getLogger(__name__)


# A task with training rows only is evaluated on its first rows, so that its column is not empty; Task.held_out is
# then False. More rows would tell nothing new: the model has seen them all.
NUM_TRAINING_ROWS_JUDGED = 256

MAX_NAME = 100  # characters of a task that is named after several files


@dataclass(frozen=True)
class Task:
    """One task of the stream, tokenized.

    Attributes:
        name: folder name, or the file's stem.
        train: columns input_ids and labels; rows with images have those of image_rows.ENCODED.
        eval: for the loss during training; the test rows if there are no such rows.
        test: for the result matrix; the eval rows if there is no test file, and the first training rows if there is
            neither.
        answers: gold answers of test, as text, in its order; if a row has several, the one that is trained.
        prompt_texts: prompts of test, as text, in its order.
        held_out: whether test holds rows that are not trained.
        generates: whether answers can be generated and read; False for plain text and without a tokenizer.
        references: all gold answers of each row of test, if rows may have several; else empty.
        has_validation: whether eval holds rows that are not trained; without a test file they are test too.
        validation: what answers, prompt_texts and references are of test, of eval; None unless eval holds rows that are
            neither trained nor in test.
    """

    name: str
    train: datasets.Dataset
    eval: datasets.Dataset
    test: datasets.Dataset
    answers: list[str] = field(repr=False)
    prompt_texts: list[str] = field(repr=False)
    held_out: bool = True
    generates: bool = True
    references: list[list[str]] = field(default_factory=list, repr=False)
    has_validation: bool = False
    validation: "Gold | None" = field(default=None, repr=False)

    def on_validation(self) -> "Task":
        """Return the task with its eval rows in place of the test rows."""
        gold = self.validation
        if gold is None:
            return self
        return replace(
            self,
            test=self.eval,
            answers=gold.answers,
            prompt_texts=gold.prompt_texts,
            references=gold.references,
        )

    @property
    def has_images(self) -> bool:
        """Whether rows of test are asked about images."""
        return "image" in self.test.column_names

    def prompts(self) -> list[list[int]]:
        """Return the token ids to generate an answer from, for each row of test, in its order."""
        return [split_prompt(row["input_ids"], row["labels"])[0] for row in self.test]


@dataclass(frozen=True)
class Gold:
    """What the rows of a split ask and what answers them, as text and in their order; see Task."""

    answers: list[str]
    prompt_texts: list[str]
    references: list[list[str]]


def load_task_stream(arguments: DataArguments, processing: Processing, seed: int = 42) -> list[Task]:
    """Return the tasks that --train_file, or --task_dir with --tasks, names; in order.

    Args:
        arguments: checked settings; either train_file or task_dir is set.
        processing: the model's tokenizer or processor.
        seed: of --validation_share.
    Raises:
        UserError: no data is named, a task is unknown or repeated, or a file cannot be used.
    """
    mode = arguments.chat_template
    encoder = Encoder(tokenizer_of(processing), arguments.cutoff, mode == "true", mode != "false")
    prompt = ImagePrompt(processing) if isinstance(processing, ProcessorMixin) else None
    reader = TaskReader(arguments, encoder, prompt, seed)
    if arguments.train_file is not None and len(split_files(arguments.train_file)) > 1:
        return [_load_mixed(arguments, reader)]
    return [_load_task(name, files, reader) for name, files in _task_files(arguments).items()]


def _load_mixed(arguments: DataArguments, reader: TaskReader) -> Task:
    """Return one task of the rows of several training files. Each may have a format of its own."""
    paths = split_files(arguments.train_file or "")
    probs = parse_probs(arguments.interleave_probs, len(paths))
    name = "+".join(Path(path.split(":")[0]).stem for path in paths)[:MAX_NAME]

    # Each file by itself. A file of held-out rows belongs to all of them, so it is read once.
    held_out = {"eval": arguments.eval_file} if arguments.eval_file else {}
    parts = [_load_task(name, {"train": path, **(held_out if path == paths[0] else {})}, reader) for path in paths]
    if any("image" in part.train.column_names for part in parts):
        raise UserError("--train_file: rows with images come from one file; put them into one")
    train = mixed([part.train for part in parts], probs, arguments.stopping_strategy, reader.seed)
    logger.warning("task %s: %d training rows from %d files", name, len(train), len(paths))
    whole = replace(parts[0], train=first_rows(train, arguments.max_train_samples))
    if held_out:
        return whole

    # Without that file every training file gives the rows that judge: held out, or its first ones.
    test = datasets.concatenate_datasets([part.test for part in parts])
    return replace(
        whole,
        eval=test,
        test=test,
        answers=[text for part in parts for text in part.answers],
        prompt_texts=[text for part in parts for text in part.prompt_texts],
        references=[text for part in parts for text in part.references] if all(p.references for p in parts) else [],
        generates=all(part.generates for part in parts),
    )


def holds_token_ids(arguments: DataArguments) -> bool:
    """Return whether all rows are token ids already, judged by each file's first row. Then no tokenizer is needed."""
    named = [one for files in _task_files(arguments).values() for path in files.values() for one in split_files(path)]
    named += [path for path in (arguments.general_file, arguments.general_text) if path]
    columns = parse_columns(arguments.columns)
    paths = [Path(path) for path in named]
    return all(path.suffix.lower() in READERS and path.is_file() for path in paths) and all(
        first_format(path, columns).kind == TOKENS for path in paths
    )


def _task_files(arguments: DataArguments) -> dict[str, dict[str, str]]:
    """Return task name -> split -> path or Hub name, in the order of the stream."""
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
    """Return split -> file of a task's folder, with any known suffix, or train.json if there is none.

    Raises:
        UserError: a split has two files.
    """
    found = {}
    for split in ("train", "eval", "test"):
        paths = [folder / f"{split}{suffix}" for suffix in READERS]
        there = [path for path in paths if path.exists()]
        if len(there) > 1:
            names = " and ".join(path.name for path in there)
            raise UserError(f"{folder} has {names}: a split is one file; put them together, or remove one")
        if there or split == "train":
            found[split] = str((there or paths)[0])
    return found


def _load_task(name: str, files: dict[str, str], reader: TaskReader) -> Task:
    max_eval_samples, share = reader.arguments.max_eval_samples, reader.arguments.validation_share
    limits = {"train": reader.arguments.max_train_samples, "eval": max_eval_samples, "test": max_eval_samples}
    if share is not None and "eval" in files:
        raise UserError(f"task {name} has {files['eval']}, so --validation_share holds nothing out; drop one of them")

    # Read every split, and say what each file was taken for.
    read = {split: reader.read(path, limits[split]) for split, path in files.items()}
    for split, file in read.items():
        reader.show(file, files[split])

    # Rows of the file are held out, so that pieces of one text stay together.
    if share is not None:
        kept, chosen = hold_out(len(read["train"].rows), share, reader.seed, files["train"])
        read |= {"train": read["train"].select(kept), "eval": read["train"].select(chosen[:max_eval_samples])}
        logger.warning("%s: %d rows are held out (--validation_share)", files["train"], len(chosen))
    splits, rows = ({split: getattr(file, part) for split, file in read.items()} for part in ("encoded", "rows"))

    # Choose the test rows: test, else eval, else the first training rows.
    held_out = len(splits) > 1
    judged = splits["train"] if held_out else first_rows(splits["train"], max_eval_samples or NUM_TRAINING_ROWS_JUDGED)
    test_split = "test" if "test" in splits else "eval" if "eval" in splits else "train"
    test = splits[test_split] if held_out else judged

    # Keep their texts beside them, for the scores and the records.
    kind = read[test_split].format.kind
    gold = _gold(rows[test_split], test, reader.encoder)
    validates = "eval" in splits and test_split != "eval"
    return Task(
        name=name,
        train=splits["train"],
        eval=splits.get("eval", test),
        test=test,
        answers=gold.answers,
        prompt_texts=gold.prompt_texts,
        held_out=held_out,
        generates=kind != TEXT and not isinstance(reader.encoder.tokenizer, TokenIds),
        references=gold.references,
        has_validation="eval" in splits,
        validation=_gold(rows["eval"], splits["eval"], reader.encoder) if validates else None,
    )


def _gold(rows: datasets.Dataset, encoded: datasets.Dataset, encoder: Encoder) -> Gold:
    """Return the texts of the rows that were encoded, which may be the first ones only."""
    prompt_texts, answers = _texts(first_rows(rows, len(encoded)), encoded, encoder)
    references = rows["answers"] if "answers" in rows.column_names else []
    return Gold(answers, prompt_texts, list(references)[: len(encoded)])


def _texts(rows: datasets.Dataset, encoded: datasets.Dataset, encoder: Encoder) -> tuple[list[str], list[str]]:
    """Return prompts and gold answers as text. Rows without texts are decoded from their token ids."""
    for answer in ("answer", "completion"):
        if answer in rows.column_names:
            # What is generated is read without its EOS, so a gold answer that names it loses it too.
            eos = encoder.tokenizer.eos_token or ""
            return list(rows["prompt"]), [text.removesuffix(eos) for text in rows[answer]]
    pairs = (split_prompt(row["input_ids"], row["labels"]) for row in encoded)
    prompts, answers = zip(*pairs, strict=True)

    def decode(many: Iterable[list[int]]) -> list[str]:
        return [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in many]

    if "messages" in rows.column_names:
        last = [[turn["content"] for turn in row if turn["role"] == "assistant"][-1] for row in rows["messages"]]
        is_cut = [len(row["input_ids"]) >= encoder.cutoff for row in encoded]  # then another turn may be the last
        texts = zip(last, decode(answers), is_cut, strict=True)
        return decode(prompts), [kept if cut else whole for whole, kept, cut in texts]
    return decode(prompts), decode(answers)
