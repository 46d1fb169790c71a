"""Formats of data files: what each tool's rows become, and what is refused with the nearest known one."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import PreTrainedTokenizerFast

from piece_ds.config.arguments import DataArguments
from piece_ds.data.files import load_rows, read_data_file
from piece_ds.data.formats import parse_columns
from piece_ds.data.held_out import hold_out
from piece_ds.data.readers import read_rows
from piece_ds.data.tasks import Task, load_task_stream
from piece_ds.demo.model import make_tokenizer
from piece_ds.runtime.errors import UserError

CHAT_ML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


QUESTION, ANSWER = turn("user", "2+2?"), turn("assistant", "4")

# What each tool's own page shows, in its keys -> the turns.
CONVERSATIONS: dict[str, tuple[dict[str, Any], list[dict[str, str]], int]] = {
    "openai": (
        {"messages": [turn("system", "Count."), QUESTION, ANSWER]},
        [turn("system", "Count."), QUESTION, ANSWER],
        0,
    ),
    "openai developer, parts, names": (
        {
            "messages": [
                turn("developer", "Count."),
                {
                    "role": "user",
                    "name": "a",
                    "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}],
                },
                {**ANSWER, "tool_calls": None, "refusal": None},
            ]
        },
        [turn("system", "Count."), QUESTION, ANSWER],
        0,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
            "system": "Count.",
            "tools": "",
        },
        [turn("system", "Count."), QUESTION, ANSWER],
        0,
    ),
    "sharegpt with empty system": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": ""},
        [QUESTION, ANSWER],
        0,
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2+2", "output": "4", "text": "Below is an instruction ..."},
        [turn("user", "Add.\n2+2"), ANSWER],
        0,
    ),
    "alpaca without input": ({"instruction": "2+2?", "input": "", "output": "4"}, [QUESTION, ANSWER], 0),
    "alpaca with system and history": (
        {"instruction": "2+2?", "output": "4", "system": "Count.", "history": [["1+1?", "2"]]},
        [turn("system", "Count."), turn("user", "1+1?"), turn("assistant", "2"), QUESTION, ANSWER],
        0,
    ),
    "trl prompt and completion of messages": ({"prompt": [QUESTION], "completion": [ANSWER]}, [QUESTION, ANSWER], 1),
}


def write(folder: Path, *rows: Any, name: str = "a.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def test_conversations_of_every_tool_become_the_same_turns(tmp_path: Path) -> None:
    for name, (row, messages, num_context) in CONVERSATIONS.items():
        (found,) = load_rows(write(tmp_path, row))
        assert found == {"messages": messages, "num_context": num_context}, name


def test_parquet_with_structs_gives_the_same_turns(tmp_path: Path) -> None:
    row, messages, _ = CONVERSATIONS["openai"]
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "a.parquet")
    assert load_rows(str(tmp_path / "a.parquet"))[0]["messages"] == messages


def test_texts_keep_their_kind(tmp_path: Path) -> None:
    for row, name in (
        ({"prompt": "p", "completion": "c"}, "prompt/completion"),
        ({"text": "t"}, "text"),
        ({"prompt": "p", "answer": "a", "messages": [], "text": ""}, "prompt/answer"),
    ):
        file = read_data_file(write(tmp_path, row))
        assert file.format.name == name
        assert file.rows[0] == {key: row[key] for key in file.format.keys}


def test_columns_rename_before_a_format_is_looked_for(tmp_path: Path) -> None:
    rows = [{"question": "p", "target": 4, "answer": "not this"}, {"question": "q", "target": "b", "answer": ""}]
    columns = parse_columns("prompt=question, answer=target")
    assert list(load_rows(write(tmp_path, *rows), columns=columns)) == [
        {"prompt": "p", "answer": "4"},
        {"prompt": "q", "answer": "b"},
    ]
    dialogs = {"dialog": [QUESTION, ANSWER]}
    assert load_rows(write(tmp_path, dialogs), columns={"dialog": "messages"})[0]["messages"] == [QUESTION, ANSWER]
    (tmp_path / "a.csv").write_text("question,target\np,a\n")
    assert list(load_rows(str(tmp_path / "a.csv"), columns=columns)) == [{"prompt": "p", "answer": "a"}]


def test_columns_that_say_nothing_clear_are_refused() -> None:
    for text, message in {
        "prompt": "expects KNOWN=NAME",
        "prompt=": "expects KNOWN=NAME",
        "prompt=a,,answer=b": "expects KNOWN=NAME",
        "promt=a": "Did you mean 'prompt'",
        "prompt=a,answer=a": "names 'a' twice",
        "prompt=a,prompt=b": "names 'prompt' twice",
    }.items():
        with pytest.raises(UserError, match=message):
            parse_columns(text)


# row -> what the one line says
REFUSED = {
    '{"question": "p", "target": "a"}': r"--columns prompt=question,answer=target\)",
    '{"instruction": "p", "response": "a"}': r"nearest known format is Alpaca \(instruction, output\).*output=response",
    '{"conversation": []}': r"nearest known format is ShareGPT.*conversations=conversation",
    '{"message": []}': r"nearest known format is chat messages.*messages=message",
    '{"prompt": "p", "completions": "a"}': r"nearest known format is prompt/completion.*completion=completions",
    "{}": r"nearest known format is prompt/answer",
    '{"prompt": "p", "chosen": "a", "rejected": "b"}': "pairs of preferences .* DPOTrainer .*--columns answer=chosen",
    '{"data": [{"prompt": "p", "answer": "a"}], "version": 2}': "a list of 1 rows under 'data'.*a file of that list",
    '{"data": [{"prompt": "p", "answer": "a"}], "of": "x"}': "a list of 1 rows under 'data'.*a file of that list",
    '{"train": [{"prompt": "p", "answer": "a"}], "test": []}': (
        r"a data set's splits \(1 under 'train', 0 under 'test'\).*make a file of each"
    ),
    '{"train": [{"a": 1}, {"a": 2}], "validation": [{"a": 3}], "meta": "x"}': (
        r"splits \(2 under 'train', 1 under 'validation'\)"
    ),
    '{"train": {"prompt": ["p", "q"], "answer": ["a", "b"]}}': r"a data set's splits \(2 under 'train'\)",
    '{"prompt": ["p", "q"], "answer": ["a", "b"]}': (
        r"it holds columns \(2 under 'prompt', 2 under 'answer'\).*one value under each name.*by rows"
    ),
    '{"id": [1, 2], "question": ["p", "q"], "target": ["a", "b"]}': r"it holds columns \(2 under 'id'",
    '{"prompt": {"0": "p", "1": "q"}, "answer": {"0": "a", "1": "b"}}': r"it holds columns \(2 under 'prompt'",
    '{"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]}': r"it holds columns \(2 under 'input_ids'",
    '{"messages": [[{"role": "user", "content": "x"}]]}': r"it holds columns \(1 under 'messages'\)",
    '{"text": ["t", "u"]}': r"it holds columns \(2 under 'text'\)",
    '{"a": {"prompt": "p", "answer": "a"}, "b": {"prompt": "p", "answer": "a"}}': "an object under each of 2 names",
    '{"prompt": "p", "answer": ["a", "b"]}': "answer must be text",
    '{"input_ids": [1, 2], "tokens": ["a", "b"]}': "nearest known format",
    '{"turns": [{"role": "user", "content": "x"}]}': "nearest known format is",
    '{"messages": "text"}': "messages must be a list of turns",
    '{"messages": []}': "messages must be a list of turns",
    '{"messages": null}': "messages must be a list of turns",
    '{"messages": ["hi"]}': "turn 1: expected an object",
    '{"messages": [{"role": "user"}]}': "turn 1: no role and content",
    '{"messages": [{"role": "user", "content": "x"}]}': "no turn of the assistant",
    '{"messages": [{"role": "usr", "content": "x"}]}': "role 'usr' is unknown.*Did you mean 'user'",
    '{"messages": [{"role": "tool", "content": "x"}]}': "role 'tool' is unknown",
    '{"messages": [{"role": [], "content": "x"}]}': "role .* is unknown",
    '{"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "x"}]}': "of the user is empty",
    '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}': "assistant is empty",
    '{"messages": [{"role": "user", "content": 5}]}': "content must be text",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "only parts of type 'text'",
    '{"messages": [{"role": "user", "content": ["x"]}]}': "only parts of type 'text'",
    '{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}': "'tool_calls' in a turn",
    '{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}': "'weight' in a turn",
    '{"messages": [{"role": "assistant", "content": "x"}], "tools": [{}]}': "tools and calls of them",
    '{"messages": [{"role": "assistant", "content": "x"}], "functions": "[{}]"}': "tools and calls of them",
    '{"messages": [{"role": "assistant", "content": "x"}], "images": ["a.png"]}': "images, sounds and films",
    '{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}], "image": "a.png"}': (
        "images, sounds and films"
    ),
    '{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "x"}], '
    '"tools": [{}]}': "tools and calls of them",
    '{"instruction": "x", "output": "y", "audio": {"path": "a.wav"}}': "images, sounds and films",
    '{"prompt": "p", "answer": "a", "image": "a.png"}': "images, sounds and films would not be read.*key 'image'",
    '{"prompt": "p", "answer": "a", "images": ["a.png"]}': "would not be read.*key 'images'",
    '{"prompt": "p", "answer": "a", "pic_path": "a.png"}': "would not be read.*key 'pic_path'",
    '{"prompt": "p", "completion": "a", "video": "a.mp4"}': "would not be read.*key 'video'",
    '{"input_ids": [1, 2], "labels": [1, 2], "pixel_values": [[0.1]]}': "would not be read.*key 'pixel_values'",
    '{"text": "t", "audios": ["a.wav"]}': "would not be read.*key 'audios'",
    '{"prompt": "p", "answer": "a", "tools": "[{}]"}': "tools and calls of them.*key 'tools'",
    '{"prompt": "p", "completion": "a", "functions": [{}]}': "tools and calls of them.*key 'functions'",
    '{"prompt": "p", "answer": "a", "system": "Be brief."}': "'system' has no place in a row of prompt/answer",
    '{"prompt": "p", "completion": "a", "history": [["q", "a"]]}': "'history' has no place in a row of prompt/comp",
    '{"messages": [{"role": "assistant", "content": "x"}], "history": [["q", "a"]]}': "'history' has no place",
    '{"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "x"}], "system": "t"}': (
        "may only stand first"
    ),
    '{"messages": [{"role": "assistant", "content": "x"}, {"role": "system", "content": "x"}]}': "may only stand first",
    '{"conversations": [{"from": "human", "value": "x"}], "system": 3}': "system must be text",
    '{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}': "prompt must be text",
    '{"prompt": "y", "completion": [{"role": "assistant", "content": "x"}]}': "prompt must be a list of turns",
    '{"prompt": [{"role": "assistant", "content": "x"}], "completion": [{"role": "user", "content": "x"}]}': "no turn",
    '{"prompt": "y", "completion": " "}': "completion is empty",
    '{"instruction": "", "input": "", "output": "x"}': "instruction is empty",
    '{"instruction": "x", "input": 3, "output": "x"}': "input must be text",
    '{"instruction": "x", "output": ""}': "output is empty",
    '{"instruction": "x", "output": "y", "history": ["z"]}': "history must be a list of",
    '{"text": ""}': "text is empty",
    '{"prompt": "a", "prompt": "b", "answer": "c"}': "the key 'prompt' stands twice in an object",
    '{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}': "the key 'role' stands twice",
    '{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [0, 1]}': "attention_mask must be 1 for each of the 2",
    '{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}': "attention_mask must be 1 for each of the 2",
    '{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": "x"}': "attention_mask must be 1 for each of the 2",
    '{"input_ids": [1, 9223372036854775808], "labels": [1, 1]}': "past 2\\^31",
    '{"input_ids": [1, ' + "9" * 5000 + '], "labels": [1, 1]}': "too many digits",
}


def test_rows_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    for name, frame in (("a.jsonl", "{}\n"), ("a.json", "[{}]")):
        for text, message in REFUSED.items():
            (tmp_path / name).write_text(frame.format(text))
            with pytest.raises(UserError, match=message) as refusal:
                load_rows(str(tmp_path / name))
            assert "\n" not in str(refusal.value)
            assert len(str(refusal.value)) < 700


def test_keys_that_say_nothing_are_dropped_and_one_image_is_read(tmp_path: Path) -> None:
    empty = {"tools": [], "image": None, "images": "[]", "system": "", "history": [], "id": 7, "source": "x"}
    for row in ({"prompt": "p", "answer": "a"}, {"prompt": "p", "completion": "a"}, {"text": "a"}):
        assert list(load_rows(write(tmp_path, {**empty, **row}))) == [row]
    # Token ids and text are whole as they are: what they were made of may stand beside them.
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    assert list(load_rows(write(tmp_path, {**row, "system": "s", "tools": [{}]}))) == [row]

    # A system text beside messages is their first turn.
    (found,) = load_rows(write(tmp_path, {"messages": [QUESTION, ANSWER], "system": "Count."}))
    assert found["messages"] == [{"role": "system", "content": "Count."}, QUESTION, ANSWER]

    # An empty system turn says nothing and is left out; any other empty turn is refused.
    for nothing in ("", " \n"):
        (found,) = load_rows(write(tmp_path, {"messages": [turn("system", nothing), QUESTION, ANSWER]}))
        assert found["messages"] == [QUESTION, ANSWER]
        for turns in ([turn("user", nothing), ANSWER], [QUESTION, turn("assistant", nothing)]):
            with pytest.raises(UserError, match=f"the turn of the {'user' if turns[1] == ANSWER else 'assistant'} is"):
                load_rows(write(tmp_path, {"messages": turns}))

    # A model that reads images takes one beside a pair.
    pair = {"prompt": "p", "answer": "a"}
    for more, image in (({"image": "x"}, "x"), ({"image": "x", "pic_path": "x"}, "x"), ({"pic_path": ""}, None)):
        assert load_rows(write(tmp_path, {**pair, **more}), images=True)["image"][:] == [image]
    for more, message in (
        ({"images": ["x"]}, "may name one image, as the key 'image'; remove the key 'images'"),
        ({"image": "x", "pic_path": "y"}, "image and pic_path name different files"),
        ({"image": ["x", "y"]}, "image must be the path of one file"),
    ):
        with pytest.raises(UserError, match=message):
            load_rows(write(tmp_path, {**pair, **more}), images=True)


def test_a_column_named_twice_is_refused_in_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer, prompt\n1,2,3\n")
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 3, names=["prompt", "answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    turns = pyarrow.StructArray.from_arrays([pyarrow.array(["x"])] * 2, names=["role", "role"])
    nested = pyarrow.ListArray.from_arrays([0, 1], turns)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([nested], names=["messages"]), tmp_path / "b.parquet")
    for name, column in {"a.csv": "prompt", "a.parquet": "answer", "b.parquet": "role"}.items():
        with pytest.raises(UserError, match=f"{column}' (twice|stands twice)"):
            load_rows(str(tmp_path / name))


def test_white_space_around_the_parts_of_a_list_means_nothing_and_anything_else_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for text in ("[1,[2]]", "[1,[2]]\n", "\r\n [ 1 ,\n\t[2] ]  \n", json.dumps([1, [2]], indent=4) + "\n\n"):
        path.write_text(text)
        assert list(read_rows(path)) == [1, [2]], text
    for text in ("", " \n", "[]", "[ ]\n"):
        path.write_text(text)
        assert list(read_rows(path)) == [], text
    for text, line, reason in (
        ("[1\n2]", 2, "expected , or ] after a row"),
        ("[1,\n\n]", 3, "comma before the end of the list"),
        ("[1]\n]", 2, "text after the list"),
        ("[1", 1, "expected , or ] after a row"),
        ("\n1", 2, "expected a list of rows"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"rows\.json line {line}: malformed JSON \({re.escape(reason)}\)"):
            list(read_rows(path))


def test_mixed_formats_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, {"messages": [QUESTION, ANSWER]}, {"instruction": "x", "output": "y"})
    with pytest.raises(UserError, match=r"row 2: .*Alpaca.*the rows before have .*chat messages.*use one form"):
        load_rows(path)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(64)


def load(path: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Task:
    return load_task_stream(DataArguments(train_file=path, **options), tokenizer)[0]


def test_the_start_says_what_becomes_of_a_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    short, long = ({"messages": [QUESTION, {"role": "assistant", "content": text}]} for text in ("4", "four " * 30))
    pair, text, tokens = {"prompt": "1+1?", "answer": "2"}, {"text": "Two."}, {"input_ids": [1, 2], "labels": [1, 2]}
    limits = {"max_prompt_len": 40, "max_ans_len": 8}
    for template, row, options, said in (
        (CHAT_ML, [short, long, long], limits, "loss on the assistant's turns; 2 rows end at 48 tokens"),
        (None, [short], {}, "no chat template: question and answer stand plain"),
        (CHAT_ML, [pair], {"chat_template": True}, "chat template used, loss on the answer"),
        (CHAT_ML, [pair], {}, "chat template not used (--chat_template true uses it)"),
        (None, [pair], {}, "chat template not used: there is none"),
        (CHAT_ML, [text], {}, "loss on all of it"),
        (CHAT_ML, [tokens], {}, "used as they are"),
    ):
        caplog.clear()
        tokenizer.chat_template = template
        load(write(tmp_path, *row), tokenizer, **options)
        assert f"{len(row)} rows, " in caplog.messages[0]
        assert said in caplog.messages[0]
        assert ("rows end at" in caplog.messages[0]) == ("rows end at" in said)


def test_a_conversation_task_is_judged_by_its_last_turn_and_says_what_it_is(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.chat_template = CHAT_ML
    row, _, _ = CONVERSATIONS["alpaca with system and history"]
    with caplog.at_level(logging.WARNING):
        task = load(write(tmp_path, row, row), tokenizer)
    assert len(caplog.records) == 1
    assert "2 rows, Alpaca; chat template used" in caplog.text
    assert task.answers == ["4", "4"]
    assert "loss on the assistant's turns" in caplog.text
    assert "rows end at" not in caplog.text
    whole = "<|system|>Count.</s><|user|>1+1?</s><|assistant|>2</s><|user|>2+2?</s><|assistant|>"
    assert tokenizer.decode(task.prompts()[0]) == whole
    labels = task.train[0]["labels"]
    assert tokenizer.decode([label for label in labels if label != -100]) == "2</s>4</s>"


def test_prompt_and_answer_rows_keep_their_encoding_unless_told_otherwise(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """The authors' path: a template in the tokenizer changes nothing by itself."""
    path = write(tmp_path, {"prompt": "p", "answer": "a"})
    plain = load(path, tokenizer).train[0]
    tokenizer.chat_template = CHAT_ML
    with caplog.at_level(logging.WARNING):
        assert load(path, tokenizer).train[0] == plain
    assert "prompt/answer; chat template not used (--chat_template true uses it)" in caplog.text
    wrapped = load(path, tokenizer, chat_template="true").train[0]
    assert tokenizer.decode(wrapped["input_ids"]) == "<|user|>p</s><|assistant|>a</s>"


def test_an_answer_that_names_eos_is_learned_and_judged_as_one_that_does_not(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    for key in ("answer", "completion"):
        plain, named = (load(write(tmp_path, {"prompt": "p", key: text}), tokenizer) for text in ("a", "a</s>"))
        assert (named.train[0], named.answers) == (plain.train[0], plain.answers) == (plain.train[0], ["a"])


def test_without_a_template_one_question_and_answer_stand_plain(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    row, _, _ = CONVERSATIONS["alpaca"]
    plain = load(write(tmp_path, {"prompt": "Add.\n2+2", "answer": "4"}, name="p.jsonl"), tokenizer).train[0]
    assert load(write(tmp_path, row), tokenizer).train[0] == plain
    tokenizer.chat_template = CHAT_ML
    assert load(write(tmp_path, row), tokenizer).train[0] != plain
    assert load(write(tmp_path, row), tokenizer, chat_template="false").train[0] == plain
    with pytest.raises(UserError, match=r"row 1: 3 turns need a chat template, and --chat_template false"):
        load(write(tmp_path, CONVERSATIONS["openai"][0]), tokenizer, chat_template="false")


def test_text_is_learned_whole_and_nothing_is_generated_from_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = load(write(tmp_path, {"text": "abcdefg"}), tokenizer, max_prompt_len=3, max_ans_len=2)
    assert [tokenizer.decode(row["input_ids"]) for row in task.train] == ["abcde", "fg</s>"]
    assert all(row["labels"] == row["input_ids"] for row in task.train)
    assert not task.generates


def test_held_out_rows_are_drawn_by_the_seed_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path, *({"prompt": f"p{i}", "answer": f"a{i}"} for i in range(20)))

    def split(seed: int) -> tuple[list[str], list[str]]:
        (task,) = load_task_stream(DataArguments(train_file=path, validation_share=0.25), tokenizer, seed)
        assert task.held_out
        train = [tokenizer.decode(row["input_ids"]).split("p")[1].split("a")[0] for row in task.train]
        return train, [answer[1:] for answer in task.answers]

    train, test = split(1)
    assert len(test) == 5
    assert sorted(train + test, key=int) == [str(i) for i in range(20)]
    assert train == sorted(train, key=int)
    assert split(1) == (train, test)
    assert split(2) != (train, test)
    for num_rows, share, held_out in ((20, 0.25, 5), (10, 0.16, 2), (10, 0.14, 1), (10, 0.01, 1), (3, 0.99, 2)):
        kept, held = hold_out(num_rows, share, 1, path)
        assert (len(kept), len(held)) == (num_rows - held_out, held_out), (num_rows, share)
        assert sorted([*kept, *held]) == list(range(num_rows))
    with pytest.raises(UserError, match="needs at least 2"):
        load(write(tmp_path, {"prompt": "p", "answer": "a"}), tokenizer, validation_share=0.5)
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="validation_share must be in"):
            DataArguments(train_file=path, validation_share=share)
    with pytest.raises(UserError, match="--eval_file"):
        DataArguments(train_file=path, eval_file=path, validation_share=0.5)


def test_an_indented_object_is_the_row_that_it_would_be_on_one_line(tmp_path: Path) -> None:
    """As json.dump(..., indent=2) writes it; indented rows after each other stay malformed."""
    file = tmp_path / "data.json"
    for row in ({"prompt": "p", "answer": "a"}, {"train": [{"prompt": "p", "answer": "a"}]}):
        file.write_text("\n" + json.dumps(row, indent=2) + "\n")
        assert list(read_rows(file)) == [row]
    file.write_text(2 * (json.dumps(row, indent=2) + "\n"))
    with pytest.raises(UserError, match=r"line 1: malformed JSON \(it does not end on its line\)"):
        list(read_rows(file))
    file.write_text('{\n"prompt": "p",\n"prompt": "q"}')
    with pytest.raises(UserError, match="malformed JSON"):
        list(read_rows(file))
