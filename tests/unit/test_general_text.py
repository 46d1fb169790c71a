"""General text that nobody has to bring: encoded like a task's rows, repeatable, kept once per base model."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from support.fakes import faked
from support.launches import make_model_folder
from transformers import AutoModelForCausalLM

from piece_ds.config.settings import parse
from piece_ds.data import general_text
from piece_ds.data.files import load_rows
from piece_ds.data.general_text import builtin_rows, hold_out_judged, rows_of_tokens
from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.data.tokenize import Encoder
from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation import self_written
from piece_ds.evaluation.generate import Decoding
from piece_ds.evaluation.self_written import MIN_TOKENS, SelfWriting, self_written_file, write_rows
from piece_ds.models.fingerprint import model_digest, weights_digests
from piece_ds.models.loading import load_config
from piece_ds.plan.shapes import known_config
from piece_ds.preflight import general_text as of_run
from piece_ds.preflight.general_text import (
    check_base_logits,
    check_general_text,
    judged_apart,
    read_general_text,
    write_general_text,
)
from piece_ds.runtime.errors import MachineError, UserError

pytestmark = pytest.mark.heavy

TOKENIZER = make_tokenizer(256)
WRITING = SelfWriting(num_rows=6, num_tokens=20, batch_size=3)


def test_the_loss_of_a_row_is_that_of_every_token_but_the_first() -> None:
    rows = rows_of_tokens([[1, 5, 6], [1, 7]])
    assert rows["input_ids"][:] == [[1, 5, 6], [1, 7]]
    assert rows["labels"][:] == [[IGNORED_LABEL, 5, 6], [IGNORED_LABEL, 7]]


def test_builtin_text_is_english_prose_drawn_by_seed() -> None:
    encoder = Encoder(TOKENIZER, cutoff=512)
    rows = builtin_rows(encoder, num_rows=24, num_tokens=180, seed=0)
    assert rows["input_ids"][:] == builtin_rows(encoder, 24, 180, seed=0)["input_ids"][:]
    assert rows["input_ids"][:] != builtin_rows(encoder, 24, 180, seed=1)["input_ids"][:]
    assert {len(ids) for ids in rows["input_ids"]} == {180}
    assert {ids[0] for ids in rows["input_ids"]} == {TOKENIZER.bos_token_id}
    texts = [TOKENIZER.decode(ids[1:]) for ids in rows["input_ids"]]
    assert len(set(texts)) == len(texts)
    assert sum(" the " in text for text in texts) > len(texts) / 2


def test_an_installation_without_prose_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_text, "_source_files", list)
    monkeypatch.setattr(general_text, "_topics", lambda: ["x " * 400])
    with pytest.raises(MachineError, match="carries 1 texts of at least 100 tokens, 2 are wanted"):
        builtin_rows(Encoder(TOKENIZER, cutoff=512), 2, 100, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("base"))


def open_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def test_what_a_model_writes_follows_its_own_distribution(folder: Path) -> None:
    """A model that knows one token writes it; the true one's rows begin with BOS and are of many kinds."""
    rows = write_rows(open_model(folder), TOKENIZER, WRITING, "cpu")
    assert rows["input_ids"][:] == write_rows(open_model(folder), TOKENIZER, WRITING, "cpu")["input_ids"][:]
    assert all(MIN_TOKENS <= len(ids) <= WRITING.num_tokens for ids in rows["input_ids"])
    assert {ids[0] for ids in rows["input_ids"]} == {TOKENIZER.bos_token_id}
    assert len({tuple(ids) for ids in rows["input_ids"]}) == len(rows)
    certain = open_model(folder)
    certain.lm_head = torch.nn.Linear(32, certain.config.vocab_size)
    with torch.no_grad():
        certain.lm_head.weight.zero_()
        certain.lm_head.bias.zero_()
        certain.lm_head.bias[77] = 100.0
    assert {token for ids in write_rows(certain, TOKENIZER, WRITING, "cpu")["input_ids"] for token in ids[1:]} == {77}


def test_rows_shorter_than_the_fewest_tokens_are_dropped_and_no_longer_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    written = SimpleNamespace(token_ids=[[5] * (MIN_TOKENS - 2), [6] * (MIN_TOKENS - 1), [7] * MIN_TOKENS])
    generate = faked(monkeypatch, self_written, "generate_texts").generate_texts
    generate.return_value = written
    model, first = torch.nn.Linear(1, 1), TOKENIZER.bos_token_id
    rows = write_rows(model, TOKENIZER, WRITING, "cpu")
    generate.assert_called_once_with(
        *(model, [[first]] * WRITING.num_rows, TOKENIZER, WRITING.num_tokens - 1, WRITING.batch_size, "cpu"),
        Decoding(sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=WRITING.seed),
        description="writing general text",
    )
    assert rows["input_ids"][:] == [[first, *ids] for ids in written.token_ids[1:]]


def test_the_text_is_written_once_for_each_base_model_and_reads_like_any_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECE_DS_CACHE", str(tmp_path / "cache"))
    digest = model_digest(str(folder))
    assert digest is not None
    path = self_written_file(digest, lambda: open_model(folder), TOKENIZER, WRITING, "cpu")
    expected = write_rows(open_model(folder), TOKENIZER, WRITING, "cpu")
    assert load_rows(str(path))["input_ids"][:] == expected["input_ids"][:]
    assert load_rows(str(path))["labels"][:] == expected["labels"][:]
    assert self_written_file(digest, lambda: pytest.fail("written again"), TOKENIZER, WRITING, "cpu") == path
    others = (SelfWriting(num_rows=6, num_tokens=21, batch_size=3), SelfWriting(6, 20, seed=1, batch_size=3))
    for writing in others:
        assert self_written_file(digest, lambda: open_model(folder), TOKENIZER, writing, "cpu") != path
    assert self_written_file("another model", lambda: open_model(folder), TOKENIZER, WRITING, "cpu") != path
    # A cache that cannot hold it is said before the model writes.
    monkeypatch.setenv("PIECE_DS_CACHE", str(path))
    with pytest.raises(UserError, match="PIECE_DS_CACHE"):
        self_written_file(digest, lambda: pytest.fail("the model was opened"), TOKENIZER, WRITING, "cpu")


def test_a_model_is_told_by_its_files(folder: Path, tmp_path: Path) -> None:
    assert model_digest(str(tmp_path)) is None
    assert model_digest("no/such-model-anywhere") is None
    other = open_model(folder)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path / "other")
    assert model_digest(str(tmp_path / "other")) != model_digest(str(folder))
    assert set(weights_digests(str(folder))) == {"model.safetensors"}
    config = json.loads((folder / "config.json").read_text())
    other.load_state_dict(open_model(folder).state_dict())
    other.save_pretrained(tmp_path / "same")
    (tmp_path / "same" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert weights_digests(str(tmp_path / "same")) == weights_digests(str(folder))
    assert model_digest(str(tmp_path / "same")) != model_digest(str(folder))


def test_the_flag_names_a_file_or_a_kind_and_its_older_name_means_it() -> None:
    assert parse(["--general_text", "self"]).data.general_text == "self"
    assert parse(["--general_importance_file", "f.json"]).data.general_text == "f.json"
    assert parse(["--general_importance_file", "f.json", "--general_text", "f.json"]).data.general_text == "f.json"
    with pytest.raises(UserError, match="given as self: give one of them"):
        parse(["--general_importance_file", "f.json", "--general_text", "self"])


def test_rows_of_every_kind_are_encoded_like_those_of_a_task(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIECE_DS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own.jsonl").write_text('{"text": "A text of its own."}\n')
    found = {}
    for named in (None, "self", "builtin", str(tmp_path / "own.jsonl")):
        flags = ["--model_name_or_path", str(folder), *(["--general_text", named] if named else [])]
        settings = parse(flags)
        config = load_config(settings.model)
        check_general_text(settings, config)
        read = read_general_text(settings, TOKENIZER)
        with mock.patch.object(of_run, "load_model", wraps=of_run.load_model) as load:
            found[named] = read if read is not None else write_general_text(settings, TOKENIZER, torch.float32)
        # One rank writes alone, so ZeRO-3 must not partition its model.
        assert load.mock_calls == ([mock.call(settings.model, torch.float32, whole=True)] if named == "self" else [])
    assert found.pop(None) is None
    for rows in found.values():
        assert rows is not None
        assert set(rows.column_names) == {"input_ids", "labels"}
        assert all(labels[0] == IGNORED_LABEL for labels in rows["labels"])
    assert [len(rows) > 100 for rows in found.values()] == [True, True, False]


def test_a_model_too_large_to_write_on_each_rank_is_refused() -> None:
    settings = parse(["--model_name_or_path", "some/model", "--general_text", "self"])
    with pytest.raises(UserError, match=r"some/model has 282 GB of weights.*limit 20 GB"):
        check_general_text(settings, known_config("70B"))


def test_rows_that_a_budget_judges_on_are_no_others(folder: Path) -> None:
    """Every fourth is held out, at least two, if anything else uses the text."""
    for num_rows, want in ((3, [1, 2]), (7, [5, 6]), (8, [3, 7]), (13, [3, 7, 11])):
        used, judged = hold_out_judged(rows_of_tokens([[1, row] for row in range(num_rows)]))
        assert [row[1] for row in judged["input_ids"]] == want
        assert sorted(row[1] for row in [*used["input_ids"], *judged["input_ids"]]) == list(range(num_rows))
    text, other = (rows_of_tokens([[1, row] for row in range(8)]) for _ in range(2))
    budget = {"forgetting_budget": "0.1", "general_text": "f"}
    for flags, general, want_used, want_judged in (
        ({"general_text": "f", "general_kl": "1"}, None, 8, None),
        ({**budget, "general_kl": "1"}, None, 6, 2),
        ({**budget, "general_replay": "1"}, None, 6, 2),
        ({**budget, "method": "piece-ratio"}, None, 6, 2),
        (budget, None, 8, 8),
        ({**budget, "general_kl": "1"}, other, 8, 8),
    ):
        settings = parse([item for name, value in flags.items() for item in (f"--{name}", value)])
        used, judged = judged_apart(settings, general, text)
        assert (len(used), judged if judged is None else len(judged)) == (want_used, want_judged), flags
    with pytest.raises(UserError, match="needs three or more"):
        hold_out_judged(text.select(range(2)))


def test_logits_that_the_disk_has_no_room_for_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_tokens([[1, 5, 6], [1, 7]])
    settings = parse(
        ["--model_name_or_path", str(folder), "--general_kl", "1", "--output_dir", str(tmp_path / "new" / "out")]
    )
    config = load_config(settings.model)
    size = 3 * config.vocab_size * 2
    for free in (size - 1, size):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        if free == size:
            check_base_logits(settings, config, rows, torch.bfloat16)
            continue
        with pytest.raises(UserError, match=r"logits of 2 rows .* give fewer rows"):
            check_base_logits(settings, config, rows, torch.bfloat16)
    assert not list(tmp_path.iterdir())
