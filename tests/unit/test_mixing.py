"""One task of several files: in any formats, one after another or drawn with weights, the same on every rank."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.launches import write_rows

from piece_ds.config.arguments import DataArguments
from piece_ds.config.settings import parse
from piece_ds.data.mixing import split_files
from piece_ds.data.tasks import Task, load_task_stream
from piece_ds.demo.model import make_tokenizer
from piece_ds.preflight.checks import check_overwrite
from piece_ds.runtime.errors import UserError

A = [{"prompt": f"a{i}", "answer": "A"} for i in range(12)]
B = [{"instruction": f"b{i}", "output": "B"} for i in range(6)]


@pytest.fixture
def files(tmp_path: Path) -> str:
    first, second = write_rows(tmp_path / "a.jsonl", A), write_rows(tmp_path / "b.json", B)
    return f"{first}, {second}"


def task_of(files: str, seed: int = 42, **settings: Any) -> Task:
    (task,) = load_task_stream(DataArguments(train_file=files, **settings), make_tokenizer(256), seed=seed)
    return task


def sources(task: Task) -> str:
    """The file that each training row comes from."""
    tokenizer = make_tokenizer(256)
    return "".join(tokenizer.decode(row["input_ids"], skip_special_tokens=True)[0] for row in task.train)


def test_files_follow_one_another_whatever_their_formats(files: str) -> None:
    task = task_of(files)
    assert (task.name, sources(task)) == ("a+b", 12 * "a" + 6 * "b")
    assert task.answers == 12 * ["A"] + 6 * ["B"]
    assert (task.held_out, task.has_validation) == (False, False)
    assert sources(task_of(files, max_train_samples=4)) == "aaaa"


def test_weights_draw_the_same_rows_at_every_call(files: str) -> None:
    drawn = [task_of(files, interleave_probs="1,3") for _ in range(2)]
    assert sources(drawn[0]) == sources(drawn[1])
    assert sources(drawn[0]) != sources(task_of(files, seed=43, interleave_probs="1,3"))
    counts = Counter(sources(drawn[0]))
    assert counts["b"] == 6  # the first file with no row left ends it
    assert counts["a"] < 6
    every = Counter(sources(task_of(files, interleave_probs="1,1", stopping_strategy="all_exhausted")))
    assert every["a"] >= 12
    assert every["b"] >= 6


def test_held_out_rows_come_from_every_file_or_from_their_own(files: str, tmp_path: Path) -> None:
    shared = task_of(files, validation_share=0.5)
    assert Counter(sources(shared)) == {"a": 6, "b": 3}
    assert Counter(shared.answers) == {"A": 6, "B": 3}
    assert len(shared.eval) == len(shared.test) == len(shared.prompt_texts) == 9
    assert shared.has_validation
    own = task_of(files, eval_file=str(write_rows(tmp_path / "held.jsonl", A[:2])))
    assert (own.answers, len(own.train), own.has_validation) == (["A", "A"], 18, True)


def test_what_is_no_mixture_is_refused_in_one_line(files: str, tmp_path: Path) -> None:
    first = files.split(",")[0]
    for settings, message in (
        ({"train_file": f"{first},{first}"}, "twice"),
        ({"train_file": f"{first},,{first}"}, "an empty name"),
        ({"train_file": first, "interleave_probs": "1,1"}, "belongs to several files"),
        ({"train_file": files, "interleave_probs": "1,1,1"}, "has 3 numbers for 2 files"),
        ({"train_file": files, "interleave_probs": "1,0"}, "expects positive numbers"),
        ({"train_file": files, "interleave_probs": "1,x"}, "expects positive numbers"),
        ({"train_file": files, "stopping_strategy": "never"}, "is unknown"),
        ({"train_file": f"{first},nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ):
        with pytest.raises(UserError, match=message):
            load_task_stream(DataArguments(**settings), make_tokenizer(256))
    argv = ["--train_file", f"/dev/null,{tmp_path / 'b.json'}", "--output_dir", str(tmp_path), "--use_cpu", "True"]
    with pytest.raises(UserError, match=r"b\.json lies in --output_dir"):
        check_overwrite(parse([*argv, "--overwrite_output_dir", "True"]), tmp_path)


def test_a_comma_in_a_files_own_name_is_no_border(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a,b.jsonl", A)
    assert split_files(str(path)) == [str(path)]
    assert len(split_files(",".join("x" * 300 + str(i) for i in range(20)))) == 20
