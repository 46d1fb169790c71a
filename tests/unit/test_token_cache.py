"""A file is tokenized once: what the cache gives is what tokenizing gives."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from piece_ds.config.arguments import DataArguments
from piece_ds.data import token_cache
from piece_ds.data.rows_digest import digest_of_rows
from piece_ds.data.tasks import Task, load_task_stream
from piece_ds.demo.model import make_tokenizer
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
FORMATS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"prompt": f"question {i}", "answer": str(i)} for i in range(1200)],
    "messages": [
        {"messages": [{"role": "user", "content": f"u{i}"}, {"role": "assistant", "content": f"a{i}"}]}
        for i in range(20)
    ],
    "completions": [{"prompt": f"p{i} ", "completion": f"c{i}"} for i in range(20)],
    "text": [{"text": "word " * i} for i in range(1, 40)],
    "tokens": [{"input_ids": [1, 5 + i, 7], "labels": [-100, 5 + i, 7]} for i in range(20)],
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that keeps files of any size."""
    monkeypatch.setenv("PIECE_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MIN_BYTES", 0)
    return tmp_path / "cache" / "tokenized"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tokenizer_with(
    template: str | None = TEMPLATE, word: str | None = None, eos: str | None = None
) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer(256)
    if eos is not None:
        tokenizer.eos_token = eos
    if word is not None:
        tokenizer.add_tokens([word])
    tokenizer.chat_template = template
    return tokenizer


def load(path: str, tokenizer: PreTrainedTokenizerBase | None = None, **settings: Any) -> Task:
    arguments = DataArguments(train_file=path, **{"max_prompt_len": 20, "max_ans_len": 12, **settings})
    (task,) = load_task_stream(arguments, tokenizer or tokenizer_with())
    return task


def content(task: Task) -> list[Any]:
    rows = [list(getattr(task, split)) for split in ("train", "eval", "test")]
    return [*rows, task.answers, task.prompt_texts, digest_of_rows(task.train)]


def entries(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir()) if cache.exists() else []


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("tokenized again")


def test_the_cache_gives_what_tokenizing_gives(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with rows held out of the file, where pieces of a text stay together; rows are mapped, not held."""
    caplog.set_level(logging.WARNING)
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in FORMATS.items()}
    cases = [(name, settings) for name in FORMATS for settings in ({}, {"validation_share": 0.3})]
    in_memory = [content(load(files[name], tokenized_cache=False, **settings)) for name, settings in cases]
    assert entries(cache) == []
    first = [content(load(files[name], **settings)) for name, settings in cases]
    assert len(entries(cache)) == len(FORMATS)
    assert "earlier run" not in caplog.messages[0]

    caplog.clear()
    monkeypatch.setattr(token_cache, "encoded_batches", never)
    again = [load(files[name], **settings) for name, settings in cases]
    assert in_memory == first == [content(task) for task in again]
    assert all(task.train.cache_files for task in again)
    said = [text for text in caplog.messages if "rows are held out" not in text]
    assert len(said) == len(cases)
    assert all(f"tokenized by an earlier run, in {cache}" in text for text in said)


def test_whatever_changes_ids_or_rows_has_an_entry_of_its_own(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "a.jsonl", FORMATS["messages"])
    load(path)
    num_entries = 1
    changes: list[Callable[[], Any]] = [
        lambda: load(path, max_prompt_len=21),
        lambda: load(path, max_train_samples=3),
        lambda: load(path, chat_template="false"),
        lambda: load(path, columns="messages=messages"),
        lambda: load(path, tokenizer_with(TEMPLATE.replace("<", "["))),
        lambda: load(path, tokenizer_with(TEMPLATE + "{# {{ strftime_now('%d') }} #}")),
        lambda: load(path, tokenizer_with(word="u1")),
        lambda: load(path, tokenizer_with(eos="<s>")),
        lambda: load(write(tmp_path / "a.jsonl", FORMATS["messages"][:-1])),
    ]
    for change in changes:
        change()
        num_entries += 1
        assert len(entries(cache)) == num_entries

    # Names and times are nothing to it.
    load(write(tmp_path / "b.jsonl", FORMATS["messages"]))
    load(path)
    assert len(entries(cache)) == num_entries


def test_a_template_that_writes_the_date_is_rendered_anew_every_day(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from piece_ds.data import token_cache_key

    class Tomorrow(token_cache_key.date):
        @classmethod
        def today(cls) -> "Tomorrow":
            return cls(2999, 1, 1)

    path = write(tmp_path / "a.jsonl", FORMATS["messages"])
    for template, num_entries in ((TEMPLATE, 1), ("{{ strftime_now('%d') }}" + TEMPLATE, 3)):
        load(path, tokenizer_with(template))
        with monkeypatch.context() as patched:
            patched.setattr(token_cache_key, "date", Tomorrow)
            load(path, tokenizer_with(template))
        assert len(entries(cache)) == num_entries


def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.jsonl", FORMATS["pairs"])
    expected = content(load(path))
    (folder,) = (cache / name for name in entries(cache))
    tokens = (folder / "tokens.arrow").read_bytes()

    def damage(name: str, to: bytes | None) -> None:
        if to is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(to)

    for name, to in (
        ("tokens.arrow", tokens[:-9]),
        ("tokens.arrow", tokens[:5000] + bytes([tokens[5000] ^ 1]) + tokens[5001:]),
        ("tokens.arrow", b""),
        ("rows.arrow", None),
        ("entry.json", b"{"),
        ("entry.json", None),
    ):
        caplog.clear()
        damage(name, to)
        assert content(load(path)) == expected
        assert [text for text in caplog.messages if "is damaged" in text] == [
            f"{path} is tokenized again: what the cache held in {folder} is damaged"
        ]
    caplog.clear()
    load(path)
    assert "earlier run" in caplog.text


def test_one_of_several_that_start_at_once_tokenizes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", FORMATS["pairs"])
    written, write_entry = [], token_cache._write
    found: list[Any] = []

    def counted(*arguments: Any) -> None:
        written.append(arguments[0])
        write_entry(*arguments)

    monkeypatch.setattr(token_cache, "_write", counted)
    threads = [threading.Thread(target=lambda: found.append(content(load(path)))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert len(found) == 3
    assert found[0] == found[1] == found[2]


def test_what_cannot_be_kept_is_tokenized_in_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", FORMATS["pairs"])
    expected = content(load(path, tokenized_cache=False))

    # Code that is not transformers' own may say what no file tells.
    class Own(type(tokenizer_with())):  # type: ignore[misc]
        pass

    tokenizer = tokenizer_with()
    tokenizer.__class__ = Own
    assert content(load(path, tokenizer)) == expected
    assert entries(cache) == []

    # No folder can be made there.
    (tmp_path / "full").write_text("")
    with monkeypatch.context() as patched:
        patched.setenv("PIECE_DS_CACHE", str(tmp_path / "full"))
        assert content(load(path)) == expected
    assert f"{path} is tokenized in memory: the cache folder" in caplog.text

    # A small file is not worth a folder.
    monkeypatch.setattr(token_cache, "MIN_BYTES", Path(path).stat().st_size + 1)
    load(path)
    assert entries(cache) == []


def test_rows_that_are_refused_and_files_that_change_leave_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [*FORMATS["pairs"], {"prompt": "p", "answer": " "}])
    with pytest.raises(UserError, match=r"a\.jsonl row 1201: answer is empty"):
        load(path)
    write_entry = token_cache._write

    def while_it_grows(*arguments: Any) -> None:
        write_entry(*arguments)
        write(Path(path), FORMATS["pairs"])

    write(Path(path), FORMATS["pairs"][:9])
    monkeypatch.setattr(token_cache, "_write", while_it_grows)
    with pytest.raises(UserError, match=r"a\.jsonl changed while it was read"):
        load(path)
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"] * 2
