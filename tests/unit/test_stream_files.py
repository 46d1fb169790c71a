"""Data files: what is read, and the one line that says why a file is not."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from piece_ds.data.files import load_rows
from piece_ds.runtime.errors import UserError

PAIR = {"prompt": "2+2=", "answer": "4"}


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def rows_of(path: str) -> list[dict[str, Any]]:
    return list(load_rows(path))


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", json.dumps([PAIR, PAIR])),
        ("indented.json", json.dumps([PAIR, PAIR], indent=2) + "\n\n"),
        ("lines.json", lines(PAIR, PAIR)),
        ("lines.jsonl", lines(PAIR, PAIR)),
        ("blank-lines.jsonl", "\n" + lines(PAIR) + "\n \n" + lines(PAIR) + "\n\n\n"),
        ("crlf.jsonl", lines(PAIR, PAIR).replace("\n", "\r\n")),
        ("no-last-newline.jsonl", lines(PAIR, PAIR).rstrip()),
        ("plain.csv", "prompt,answer\n2+2=,4\n2+2=,4\n"),
        ("crlf.csv", "prompt,answer\r\n2+2=,4\r\n2+2=,4\r\n"),
        ("tabs.tsv", "prompt\tanswer\n2+2=\t4\n2+2=\t4\n"),
        ("lines.ndjson", lines(PAIR, PAIR)),
        ("other-columns.csv", "id,answer, prompt\n0,4,2+2=\n1,4,2+2=\n\n"),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order-mark"])
def test_text_formats_give_the_same_rows(tmp_path: Path, name: str, text: str, mark: bytes) -> None:
    rows = load_rows(write(tmp_path, name, mark + text.encode()))
    assert list(rows) == [PAIR, PAIR]
    assert rows.column_names == ["prompt", "answer"]


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([{**PAIR, "extra": 1.5}]).to_parquet(path)
    assert rows_of(path) == [PAIR]


def test_csv_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    """The usual readers would make 1.50 a number and NA a missing value."""
    path = write(tmp_path, "a.csv", 'prompt,answer\nx,1.50\ny,NA\nz,"a, ""b""\r\nc"\n')
    assert [row["answer"] for row in rows_of(path)] == ["1.50", "NA", 'a, "b"\r\nc']


def test_unicode_and_line_separators_inside_a_row_survive(tmp_path: Path) -> None:
    row = {"prompt": "态度\u2028\u0085 😀", "answer": "支持\n\nè"}
    path = write(tmp_path, "a.jsonl", json.dumps(row, ensure_ascii=False) + "\n")
    assert rows_of(path) == [row]


def test_number_answers_become_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines({"prompt": "p", "answer": 11}, {"prompt": "p", "answer": -2.5}))
    assert [row["answer"] for row in rows_of(path)] == ["11", "-2.5"]


def test_token_rows_are_used_as_they_are(tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7], "prompt": "ignored", "answer": ""}
    assert rows_of(write(tmp_path, "a.jsonl", lines(row))) == [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}]


def test_more_rows_than_one_batch_keep_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", lines(*({"prompt": str(i), "answer": "x"} for i in range(2500))))
    assert load_rows(path)["prompt"][:] == [str(i) for i in range(2500)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "", r"a\.json is empty"),
        ("a.json", "[]", r"a\.json has no rows"),
        ("a.json", " \n", r"a\.json has no rows"),
        ("a.jsonl", "\n\n", r"a\.jsonl has no rows"),
        ("a.csv", "prompt,answer\n", r"a\.csv has no rows"),
        ("a.csv", "\n", r"a\.csv has no rows"),
        ("a.jsonl", lines(PAIR) + '{"prompt": "p", \n', r"a\.jsonl line 2: malformed JSON"),
        (
            "a.jsonl",
            lines(PAIR) + "\n" + "not json\n",
            r"a\.jsonl line 3: malformed JSON \(Expecting value at column 1",
        ),
        ("a.jsonl", "[" * 100_000 + "\n", r"a\.jsonl line 1: malformed JSON"),
        ("a.json", '[\n{"prompt": "p", "answer": "a"},\n{"prompt": }\n]', r"a\.json line 3: malformed JSON"),
        ("a.json", '[{"prompt": "p", "answer": "a"}', r"a\.json line 1: malformed JSON"),
        ("a.json", '[{"prompt": "p", "answer": "a"},]', r"comma before the end"),
        ("a.json", '[{"prompt": "p", "answer": "a"}\n{}]', r"line 2: malformed JSON \(expected , or \]"),
        ("a.json", '[{"prompt": "p", "answer": "a"}]\nrest', r"line 2: malformed JSON \(text after the list"),
        ("a.json", '"text"', r"expected a list of rows"),
        ("a.json", "[1]", r"row 1: expected an object with prompt and answer, got int"),
        ("a.jsonl", lines(PAIR, {"prompt": "p"}), r"a\.jsonl row 2: no 'answer', it has \['prompt'\]"),
        ("a.jsonl", lines({"question": "p", "x": 1}), r"row 1: no 'prompt' or 'answer', it has \['question', 'x'\]"),
        (
            "a.csv",
            "question,answer\np,a\n",
            r"no 'prompt', it has \['answer', 'question'\].*--columns prompt=question\)",
        ),
        ("a.csv", "prompt,answer\np\n", r"row 1: answer must be text, got nothing"),
        ("a.csv", "prompt,answer\np,a,b\n", r"line 2: more cells than the header's 2"),
        ("a.csv", 'prompt,answer\n"p"q,a\n', r"line 2: malformed CSV"),
        ("a.csv", "prompt;answer\np;a\n", r"expected cells split by commas, got the header 'prompt;answer'"),
        ("a.csv", "prompt\tanswer\np\ta\n", r"expected cells split by commas.* in a file named \.tsv"),
        ("a.jsonl", lines(PAIR, {"prompt": "p", "answer": "  "}), r"row 2: answer is empty"),
        ("a.jsonl", lines({"prompt": 3, "answer": "a"}), r"row 1: prompt must be text, got int '3'"),
        ("a.jsonl", lines({"prompt": "p", "answer": True}), r"row 1: answer must be text, got bool"),
        ("a.jsonl", '{"prompt": "p", "answer": NaN}', r"row 1: answer must be text, got float"),
        ("a.jsonl", lines({"prompt": "p", "answer": ["a"]}), r"row 1: answer must be text, got a list of str"),
        ("a.jsonl", '{"prompt": "\\ud800", "answer": "a"}', r"row 1: prompt holds half of a surrogate pair"),
        ("a.jsonl", b'{"prompt": "p", "answer": "a"}\n{"prompt": "\xff", "answer": "a"}\n', r"line 2: expected UTF-8"),
        ("a.jsonl", lines({"input_ids": [1, 2], "labels": [1]}), r"input_ids has 2 entries, labels 1"),
        ("a.jsonl", lines({"input_ids": [1, 2], "labels": [-100, -100]}), r"row 1: no label other than -100"),
        ("a.jsonl", lines({"input_ids": [1, 2], "labels": [2, -100]}), r"row 1: no label other than -100"),
        ("a.jsonl", lines({"input_ids": [], "labels": []}), r"row 1: no label other than -100"),
        (
            "a.jsonl",
            lines({"input_ids": [1.5], "labels": [1]}),
            r"input_ids must be a list of whole numbers, got a lis",
        ),
        ("a.jsonl", lines({"input_ids": "1", "labels": [1]}), r"input_ids must be a list of whole numbers, got str"),
        ("a.jsonl", lines({"input_ids": [1, -1], "labels": [1, 1]}), r"input_ids holds -1"),
        ("a.jsonl", lines({"input_ids": [1, 1], "labels": [1, -2]}), r"labels holds -2"),
        ("a.jsonl", lines(PAIR, {"input_ids": [1, 1], "labels": [1, 1]}), r"row 2: .* use one form in a file"),
        ("a.txt", "text", r"unknown kind of file '\.txt'"),
        ("a.parquet", "text", r"not a readable Parquet file"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        load_rows(write(tmp_path, name, text))
    assert "\n" not in str(refusal.value)


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "train.json", "[]")
    with pytest.raises(UserError, match=r"trian\.json: no such file\. Did you mean 'train\.json'\?"):
        load_rows(str(tmp_path / "trian.json"))
    with pytest.raises(UserError, match="no such file, and no folder"):
        load_rows(str(tmp_path / "nowhere" / "train.json"))


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder; expected a file.*parquet$"):
        load_rows(str(tmp_path))

    # As a data set's repository lies on the disk.
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", "train.json", "[]")
    with pytest.raises(UserError, match=r"it has .*data/train\.json \(several files"):
        load_rows(str(tmp_path))


def test_hub_name_is_loaded_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{**PAIR, "extra": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of("someone/numbers") == [PAIR]
    assert rows_of("someone/numbers:test") == [PAIR]
    assert asked == [("someone/numbers", "train"), ("someone/numbers", "test")]


def test_hub_name_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        raise ConnectionError(f"Couldn't reach {name!r}\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"someone/numbers: neither a file here nor a data set .* Couldn't reach"
    ) as refusal:
        load_rows("someone/numbers")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{\n  "data": [{"prompt": "a", "answer": "b"}]\n}\n',
            r"line 1: malformed JSON \(it does not end",
        ),
        (
            b'{"prompt": "a", "answer": "b"}\n{"prompt": "a",\n "answer": "b"}\n',
            r"line 2: malformed JSON \(it does",
        ),
        ('{"prompt": "a", "answer": "b"}'.encode("utf-16"), "got UTF-16; re-encode the file"),
        (b"\x1f\x8b\x08\x00\x00\xff", "gzip has packed; unpack it"),
    ],
)
def test_common_files_of_another_kind_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(str(path))
