"""Rows that a model cannot take are one line, before its weights are read; rows of token ids need no tokenizer."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import make_model
from transformers import GPT2Config, LlamaConfig

from piece_ds.config.arguments import DataArguments, ModelArguments
from piece_ds.data.image_collate import make_collator
from piece_ds.data.lengths import largest_of, lengths_of
from piece_ds.data.tasks import Task, holds_token_ids, load_task_stream
from piece_ds.models.loading import load_config, load_tokenizer
from piece_ds.models.token_ids import token_ids_tokenizer
from piece_ds.preflight.rows_fit import check_prompts_fit, check_rows_fit
from piece_ds.runtime.errors import UserError

ROTARY = LlamaConfig(vocab_size=50, max_position_embeddings=8)
TABLE = GPT2Config(vocab_size=50, n_positions=8, eos_token_id=49, bos_token_id=49)


def task_of(folder: Path, *rows: tuple[list[int], list[int]]) -> Task:
    path = folder / "ids.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids, "labels": labels}) + "\n" for ids, labels in rows))
    return load_task_stream(DataArguments(train_file=str(path)), token_ids_tokenizer(ROTARY))[0]


GOOD = ([1, 2, 3], [-100, 2, 3])


def test_only_rows_that_were_chosen_count(tmp_path: Path) -> None:
    """Rows held out or never drawn lie in the same table."""
    task = task_of(tmp_path, ([1] * 30, [-100] + [1] * 29), GOOD, ([60, 4], [-100, 4]), GOOD)
    for chosen, longest, largest in (([1, 3], 3, 3), ([1, 2], 3, 60), ([0], 30, 1)):
        rows = task.train.select(chosen)
        assert (lengths_of(rows).max(), largest_of(rows, "input_ids")) == (longest, largest)
    good = replace(task, train=task.train.select([1, 3]), eval=task.train.select([3]), test=task.train.select([3]))
    check_rows_fit(ROTARY, [good], {}, 0)


def test_ids_and_labels_past_the_embedding_name_the_row(tmp_path: Path) -> None:
    for rows, message in (
        ([GOOD, ([1, 50], [-100, 5])], r"task ids, train row 2: input_ids holds 50, .* has 50 rows \(ids 0 to 49\)"),
        ([GOOD, GOOD, ([1, 4], [-100, 51])], r"train row 3: labels holds 51"),
        ([([2**31 - 1, 4], [-100, 4])], r"train row 1: input_ids holds 2147483647"),
    ):
        with pytest.raises(UserError, match=message):
            check_rows_fit(ROTARY, [task_of(tmp_path, *rows)], {}, 0)
    good = task_of(tmp_path, ([49, 49], [-100, 49]))
    check_rows_fit(ROTARY, [good], {"--general_file": None}, 49)
    with pytest.raises(UserError, match=r"pads with id 50, but the model's embedding has 50 rows"):
        check_rows_fit(ROTARY, [good], {}, 50)
    with pytest.raises(UserError, match=r"--general_file row 1: input_ids holds 50"):
        check_rows_fit(ROTARY, [good], {"--general_file": task_of(tmp_path, ([50, 1], [1, 1])).train}, 0)


def test_rows_past_a_table_of_positions_are_refused_and_past_rotary_ones_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(tmp_path, GOOD, ([1] * 9, [1] * 9))
    with pytest.raises(UserError, match=r"train row 2 has 9 tokens, the model 8 positions"):
        check_rows_fit(TABLE, [task], {}, 0)
    with caplog.at_level(logging.WARNING):
        check_rows_fit(ROTARY, [task], {}, 0)
    assert "train row 2 has 9 tokens" in caplog.text
    check_rows_fit(TABLE, [task_of(tmp_path, ([1] * 8, [1] * 8))], {}, 0)


def test_a_prompt_leaves_room_for_what_is_generated(tmp_path: Path) -> None:
    task = task_of(tmp_path, ([1] * 6, [-100] * 5 + [1]))
    check_prompts_fit(TABLE, [task], {"ids": "word"}, (3, 99))
    check_prompts_fit(TABLE, [task], {"ids": "loss"}, (4, 99))
    check_prompts_fit(ROTARY, [task], {"ids": "word"}, (4, 99))
    with pytest.raises(UserError, match=r"a prompt of 5 tokens and 4 generated ones need more than the model's 8"):
        check_prompts_fit(TABLE, [task], {"ids": "word"}, (4, 2))
    with pytest.raises(UserError, match=r"--max_new_tokens_text, or judge it by loss \(--scorers ids=loss\)"):
        check_prompts_fit(TABLE, [task], {"ids": "text"}, (2, 4))


def test_a_model_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    """transformers would make GPT-2, Qwen and Gemma an empty vocabulary, and every token of a text the unknown one."""
    for family in ("llama", "gpt2", "qwen3", "gemma2", "neox"):
        folder = tmp_path / family
        make_model(family).save_pretrained(folder)
        arguments = ModelArguments(model_name_or_path=str(folder))
        with pytest.raises(UserError, match=r"the folder holds no tokenizer"):
            load_tokenizer(arguments, load_config(arguments))


def test_token_ids_are_told_by_the_files(tmp_path: Path) -> None:
    task_of(tmp_path, GOOD)
    ids, text = str(tmp_path / "ids.jsonl"), tmp_path / "text.jsonl"
    text.write_text('{"prompt": "p", "answer": "a"}\n')

    def told(**settings: Any) -> bool:
        return holds_token_ids(DataArguments(**settings))

    assert told(train_file=ids, eval_file=ids, general_file=ids)
    assert not told(train_file=str(text))
    assert not told(train_file=ids, eval_file=str(text))
    assert not told(train_file=ids, general_file=str(text))
    assert not told(train_file="someone/data")


def test_the_stand_in_writes_numbers_and_no_file(tmp_path: Path) -> None:
    tokenizer = token_ids_tokenizer(ROTARY)
    task = task_of(tmp_path, ([7, 12, 30, 2], [-100, -100, 30, 2]))
    assert (task.prompt_texts, task.answers) == (["7 12"], ["30"])  # 2 is the configuration's EOS
    assert tokenizer.decode([7, 12]) == "7 12"
    assert make_collator(tokenizer)([GOOD_ROW := {"input_ids": [7], "labels": [7]}, GOOD_ROW])["input_ids"].max() == 7
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
