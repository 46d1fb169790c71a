"""Task streams: which files make a task, and which rows judge it."""

import json
import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from piece_ds.config.arguments import DataArguments
from piece_ds.data.general_rows import load_general
from piece_ds.data.tasks import load_task_stream
from piece_ds.demo.model import make_tokenizer
from piece_ds.runtime.errors import UserError

TRACE = Path(os.environ.get("PIECE_DS_SHARED", Path(__file__).parents[3] / "shared")) / "trace"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(64)


def write_rows(path: Path, num_rows: int, mark: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{"prompt": f"{mark}{i}", "answer": f"{mark}!{i}"} for i in range(num_rows)]))
    return str(path)


def test_single_file_with_eval_is_a_stream_of_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train, held_out = write_rows(tmp_path / "sums.json", 3, "t"), write_rows(tmp_path / "e.json", 2, "e")
    (task,) = load_task_stream(DataArguments(train_file=train, eval_file=held_out), tokenizer)
    assert (task.name, len(task.train), len(task.eval), len(task.test)) == ("sums", 3, 2, 2)
    assert task.answers == ["e!0", "e!1"]
    assert task.held_out
    assert [tokenizer.decode(ids) for ids in task.prompts()] == ["<s>e0", "<s>e1"]


def test_training_rows_alone_judge_themselves_and_say_so(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    train = write_rows(tmp_path / "sums.json", 300, "t")
    (task,) = load_task_stream(DataArguments(train_file=train), tokenizer)
    assert not task.held_out
    assert (len(task.train), len(task.eval), len(task.test), len(task.answers)) == (300, 256, 256, 256)
    (task,) = load_task_stream(DataArguments(train_file=train, max_eval_samples=5), tokenizer)
    assert (len(task.train), len(task.test), task.answers[-1]) == (300, 5, "t!4")


def test_two_files_for_one_split_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name in ("train.json", "test.json"):
        write_rows(tmp_path / "a" / name, 4, "x")
    (tmp_path / "a" / "test.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    with pytest.raises(UserError, match=r"a has test\.json and test\.jsonl: a split is one file"):
        load_task_stream(DataArguments(task_dir=str(tmp_path), tasks="a"), tokenizer)


def test_stream_keeps_the_order_asked_for_and_fills_in_absent_files(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, splits in {"a": ("train", "eval"), "b": ("train", "test"), "c": ("train", "eval", "test")}.items():
        for split in splits:
            write_rows(tmp_path / name / f"{split}.json", 4, split)
    tasks = load_task_stream(DataArguments(task_dir=str(tmp_path), tasks="c, a,b", max_eval_samples=2), tokenizer)
    assert [task.name for task in tasks] == ["c", "a", "b"]
    assert [task.answers for task in tasks] == [["test!0", "test!1"], ["eval!0", "eval!1"], ["test!0", "test!1"]]
    assert [tokenizer.decode(task.eval[0]["input_ids"]) for task in tasks] == [
        "<s>eval0eval!0</s>",
        "<s>eval0eval!0</s>",
        "<s>test0test!0</s>",
    ]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("a,FOMK", r"no task 'FOMK' in .*; it has FOMC, a\. Did you mean 'FOMC'\?"),
        ("a,a", "holds 'a' twice"),
        ("a,,FOMC", "holds an empty name"),
        ("a,FOMC", r"FOMC/train\.json: no such file"),
    ],
)
def test_unusable_task_lists_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tasks: str, message: str
) -> None:
    write_rows(tmp_path / "a" / "train.json", 1, "x")
    (tmp_path / "FOMC").mkdir()
    with pytest.raises(UserError, match=message):
        load_task_stream(DataArguments(task_dir=str(tmp_path), tasks=tasks), tokenizer)


def test_missing_task_folder_and_missing_data_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_task_stream(DataArguments(task_dir=str(tmp_path / "x"), tasks="a"), tokenizer)
    with pytest.raises(UserError, match="no training data"):
        load_task_stream(DataArguments(), tokenizer)


def test_token_rows_have_answers_and_prompts_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    word = tokenizer("yes", add_special_tokens=False)["input_ids"]
    rows = [{"input_ids": [1, 9, *word, 2], "labels": [-100, -100, *word, 2]}]
    path = tmp_path / "ready.json"
    path.write_text(json.dumps(rows))
    (task,) = load_task_stream(DataArguments(train_file=str(path)), tokenizer)
    assert list(task.train) == rows
    assert (task.prompts(), task.answers) == ([[1, 9]], ["yes"])


def test_general_text_is_a_txt_file_rows_of_text_or_rows_of_pairs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "g.txt").write_text("abcdefghij", encoding="utf-8-sig")
    (tmp_path / "g.jsonl").write_text('{"text": "abcdefghij"}\n{"text": "k"}\n')
    assert [len(row["input_ids"]) for row in load_general(str(tmp_path / "g.txt"), tokenizer, cutoff=4)] == [5, 5, 3]
    assert [len(row["input_ids"]) for row in load_general(str(tmp_path / "g.jsonl"), tokenizer, cutoff=4)] == [
        5,
        5,
        3,
        2,
    ]
    assert len(load_general(str(tmp_path / "g.jsonl"), tokenizer, cutoff=4, max_rows=2)) == 2
    pairs = load_general(write_rows(tmp_path / "p.json", 2, "x"), tokenizer, cutoff=64)
    assert pairs[0]["labels"][:3] == [-100] * 3
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        load_general(str(tmp_path / "empty.txt"), tokenizer, cutoff=4)


@pytest.mark.skipif(not TRACE.is_dir(), reason="TRACE is not here")
def test_all_of_trace_loads(tokenizer: PreTrainedTokenizerFast) -> None:
    names = [folder.name for folder in sorted(TRACE.iterdir())]
    arguments = DataArguments(task_dir=str(TRACE), tasks=",".join(names), max_eval_samples=8, max_prompt_len=64)
    tasks = load_task_stream(arguments, tokenizer)
    assert [len(task.train) for task in tasks] == [30 if name == "MeetingBank" else 1000 for name in names]
    assert all(len(task.test) == 8 and task.held_out for task in tasks)
