"""From texts to token ids: truncation, BOS and EOS, labels, padding."""

import datasets
import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from piece_ds.data.collate import Collator, pad_id
from piece_ds.data.image_collate import make_collator
from piece_ds.data.tokenize import Encoder, split_prompt, tokenize_rows
from piece_ds.demo.model import make_tokenizer
from piece_ds.runtime.errors import UserError

BOS, EOS = 1, 2


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every length below can be counted by eye."""
    return make_tokenizer(64)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_gets_bos_answer_gets_eos_and_loss_is_on_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Encoder(tokenizer, cutoff=10).pair("abc", "de", "row")
    assert row["input_ids"] == [BOS, *ids(tokenizer, "abc"), *ids(tokenizer, "de"), EOS]
    assert row["labels"] == [-100] * 4 + [*ids(tokenizer, "de"), EOS]


@pytest.mark.parametrize(
    ("text", "kept", "has_room"),
    [("", "", True), ("abc", "abc", True), ("abcd", "abcd", False), ("abcde", "bcde", False)],
)
def test_cutoff_keeps_the_end_and_leaves_no_room_at_exactly_the_cutoff(
    tokenizer: PreTrainedTokenizerFast, text: str, kept: str, has_room: bool
) -> None:
    encoder = Encoder(tokenizer, cutoff=4)
    assert encoder.prompt_ids(text) == [BOS] * has_room + ids(tokenizer, kept)
    if text:
        assert encoder.answer_ids(text) == ids(tokenizer, kept) + [EOS] * has_room


def test_eos_stands_in_for_a_missing_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = None
    assert Encoder(tokenizer, cutoff=8).prompt_ids("a")[0] == EOS


def test_tokenizer_without_eos_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        Encoder(tokenizer, cutoff=8)


def test_answer_that_gives_no_token_names_file_and_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    rows = datasets.Dataset.from_list([{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "~~"}])
    with pytest.raises(UserError, match=r"a\.json row 2: no answer token is left after tokenization of '~~'"):
        tokenize_rows(rows, Encoder(tokenizer, cutoff=8), "a.json")


def test_chat_template_wraps_the_prompt_and_brings_its_own_start(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "<s>U:{{ messages[0]['content'] }}{% if add_generation_prompt %} A:{% endif %}"
    encoder = Encoder(tokenizer, cutoff=20, chat_template=True)
    assert encoder.prompt_ids("hi") == [BOS, *ids(tokenizer, "U:hi A:")]
    assert encoder.pair("hi", "x", "row")["labels"][-2:] == [*ids(tokenizer, "x"), EOS]


def test_chat_template_flag_without_a_template_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no chat template"):
        Encoder(tokenizer, cutoff=20, chat_template=True)


def test_text_is_cut_into_windows_that_cover_it(tokenizer: PreTrainedTokenizerFast) -> None:
    windows = Encoder(tokenizer, cutoff=4).windows("abcdefghi")
    assert [window["input_ids"] for window in windows] == [
        [BOS, *ids(tokenizer, piece)] for piece in ("abcd", "efgh", "i")
    ]
    assert all(window["labels"] == [-100, *window["input_ids"][1:]] for window in windows)


def test_tokenizing_keeps_order_and_makes_no_files(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = datasets.Dataset.from_list([{"prompt": str(i), "answer": "é"} for i in range(1500)])
    encoder = Encoder(tokenizer, cutoff=8)
    encoded = tokenize_rows(rows, encoder, "rows")
    assert encoded.cache_files == []
    assert list(encoded) == [encoder.pair(str(i), "é", "") for i in range(1500)]
    assert tokenize_rows(encoded, encoder, "rows") is encoded


def test_prompt_of_an_encoded_row_is_the_prompt_to_generate_from(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = Encoder(tokenizer, cutoff=8)
    row = encoder.pair("abc", "de", "row")
    assert split_prompt(row["input_ids"], row["labels"]) == (encoder.prompt_ids("abc"), encoder.answer_ids("de"))


def test_row_with_labels_from_its_first_position_keeps_one_token_to_continue() -> None:
    assert split_prompt([5, 6, 7], [5, 6, 7]) == ([5], [6, 7])
    # A template may write more after the last turn, which has no loss: it belongs to neither part.
    assert split_prompt([5, 6, 7, 8], [-100, 6, 7, -100]) == ([5], [6, 7])


@pytest.mark.parametrize(("longest", "padded"), [(1, 8), (7, 8), (8, 8), (9, 16)])
def test_batches_are_padded_on_the_right_to_a_multiple_of_8(longest: int, padded: int) -> None:
    rows = [{"input_ids": [9] * longest, "labels": [9] * longest}, {"input_ids": [7], "labels": [-100], "answer": "x"}]
    batch = Collator(pad_id=3)(rows)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, (2, padded))
    )
    assert batch["input_ids"][1].tolist() == [7] + [3] * (padded - 1)
    assert batch["labels"][0].tolist() == [-100] + [9] * (longest - 1) + [-100] * (padded - longest)
    assert batch["labels"][1].tolist() == [-100] * padded
    assert batch["attention_mask"].tolist() == [[1] * n + [0] * (padded - n) for n in (longest, 1)]
    left = Collator(pad_id=3, side="left")(rows)
    assert left["input_ids"][1].tolist() == [3] * (padded - 1) + [7]
    assert left["labels"][0].tolist() == [-100] * (padded - longest + 1) + [9] * (longest - 1)


def test_a_single_row_is_not_padded() -> None:
    """A model that sees padding is then trained right, one row at a time."""
    batch = Collator(pad_id=3)([{"input_ids": [9, 8, 7], "labels": [9, 8, 7]}])
    assert (batch["input_ids"].tolist(), batch["attention_mask"].tolist()) == ([[9, 8, 7]], [[1, 1, 1]])


def test_padding_token_falls_back_to_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_collator(tokenizer).pad_id == 0
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == EOS
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="neither a pad_token nor an eos_token"):
        pad_id(tokenizer)
