"""The embedded default: deterministic, right answers, disjoint splits, loadable by transformers' ordinary classes."""

import json
import re
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from piece_ds.cli import demo
from piece_ds.config.settings import parse
from piece_ds.demo.corpus import MIN_FILE_BYTES, SKIPPED_FOLDERS, draw_text_rows, source_files, split_files
from piece_ds.demo.recipe import EmbeddedRecipe
from piece_ds.demo.tasks import NUMBER_SKILLS, SKILLS, WORD_SKILLS, draw_rows
from piece_ds.demo.write import EmbeddedPaths, write_embedded

pytestmark = pytest.mark.heavy

SMALL = EmbeddedRecipe(num_base_rows=400, num_general_rows=40, num_train_rows=300, num_eval_rows=60, num_test_rows=60)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedPaths:
    return write_embedded(tmp_path_factory.mktemp("embedded"), seed=1, recipe=SMALL)


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_task(paths: EmbeddedPaths, name: str) -> dict[str, list[dict[str, str]]]:
    return {
        split: json.loads((paths.task_dir / name / f"{split}.json").read_text(encoding="utf-8"))
        for split in ("train", "eval", "test")
    }


def solve(name: str, prompt: str) -> str:
    """The answer to a prompt, computed another way than the package computes it."""
    operands = prompt.rstrip(":").split()
    if name == "largest-letter":
        return sorted(operands[-1])[-1]
    if name == "odd-digit":
        return operands[-1].translate(str.maketrans("", "", "02468"))[:1]
    if name == "end-letter":
        return operands[-1][4:]
    if name == "hidden-digit":
        return operands[-1].strip(ascii_lowercase)
    raise KeyError(name)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_seed_writes_the_same_bytes(embedded: EmbeddedPaths, tmp_path: Path) -> None:
    write_embedded(tmp_path, seed=1, recipe=SMALL)
    assert files_of(tmp_path) == files_of(embedded.model_dir.parent)


def test_another_seed_writes_other_data_and_weights(embedded: EmbeddedPaths, tmp_path: Path) -> None:
    write_embedded(tmp_path, seed=2, recipe=SMALL)
    ours, theirs = files_of(embedded.model_dir.parent), files_of(tmp_path)
    assert ours.keys() == theirs.keys()
    for name in ("untrained/model.safetensors", "base.jsonl", "general.jsonl", "tasks/odd-digit/train.json"):
        assert ours[name] != theirs[name], name


def test_global_random_state_is_untouched(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    write_embedded(tmp_path, seed=3, recipe=SMALL)
    assert torch.equal(before, torch.random.get_rng_state())


def test_splits_share_no_prompt(embedded: EmbeddedPaths) -> None:
    for name in embedded.task_names:
        prompts = [row["prompt"] for rows in read_task(embedded, name).values() for row in rows]
        assert len(prompts) == len(set(prompts)) == 300 + 60 + 60


def test_every_task_answer_is_right(embedded: EmbeddedPaths) -> None:
    for name in embedded.task_names:
        for rows in read_task(embedded, name).values():
            for row in rows:
                assert row["answer"] == solve(name, row["prompt"]), (name, row)


def test_prompts_are_short_and_answers_are_one_character(embedded: EmbeddedPaths) -> None:
    for name in embedded.task_names:
        for rows in read_task(embedded, name).values():
            assert all(len(row["prompt"]) <= 32 and len(row["answer"]) == 1 for row in rows)


def test_no_answer_dominates_a_task(embedded: EmbeddedPaths) -> None:
    """A constant answer must not pass for learning: the commonest one is right in at most 60 % of the rows."""
    for name in embedded.task_names:
        answers = [row["answer"] for row in read_task(embedded, name)["train"]]
        assert max(answers.count(answer) for answer in set(answers)) <= 0.6 * len(answers)


def test_base_material_never_shows_a_task(embedded: EmbeddedPaths) -> None:
    """No base prompt is one of a task: what the stream learns, the base was not told."""
    base = {row["prompt"] for row in read_jsonl(embedded.base_train_file)}
    for name in embedded.task_names:
        assert not base & {row["prompt"] for rows in read_task(embedded, name).values() for row in rows}


def test_base_skills_by_hand() -> None:
    assert {name: SKILLS[name]("piece") for name in WORD_SKILLS} == {
        "first": "p",
        "last": "e",
        "smallest": "c",
        "length": "5",
        "third": "e",
        "vowel": "i",
    }
    assert SKILLS["vowel"]("rhythm") == "-"
    assert {name: SKILLS[name]("4093") for name in NUMBER_SKILLS} == {"lowest": "0", "highest": "9", "parity": "odd"}


def test_general_text_comes_from_files_the_base_never_reads() -> None:
    paths = source_files()
    learned, held_out = split_files(paths, Random("0"))
    assert sorted(learned + held_out) == paths
    assert not set(learned) & set(held_out)
    assert held_out


def test_general_rows_have_text_of_the_length_asked(embedded: EmbeddedPaths) -> None:
    rows = read_jsonl(embedded.general_file)
    assert len(rows) == SMALL.num_general_rows
    assert all(row["prompt"] == "" and len(row["answer"].encode()) == SMALL.text_bytes for row in rows)


@pytest.mark.parametrize("text", ["", "largest hello:", "  two  spaces\n\ttab", "naïve 中文 🙂", "\x00\x7f"])
def test_tokenizer_round_trip(embedded: EmbeddedPaths, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(token_ids) == len(text.encode())
    assert tokenizer.decode(token_ids) == text


def test_tokenizer_has_distinct_special_tokens_and_pads_left(embedded: EmbeddedPaths) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir)
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer(["a", "abc"], padding=True)["input_ids"][0][:2] == [0, 0]
    assert "token_type_ids" not in tokenizer("a")


def test_model_loads_and_its_vocabulary_is_that_of_the_tokenizer(embedded: EmbeddedPaths) -> None:
    model = AutoModelForCausalLM.from_pretrained(embedded.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_dir)
    assert model.config.vocab_size == len(tokenizer) == 259
    assert model.dtype == torch.float32
    assert model.num_parameters() == 361_472  # the recipe's steps and rates were chosen for this size
    generated = model.generate(**tokenizer("largest hello:", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    assert generated.shape == (1, 16)


def test_draw_rows_refuses_more_rows_than_there_are_questions() -> None:
    with pytest.raises(ValueError, match="only 2 of 3 different prompts"):
        draw_rows(lambda random: {"prompt": random.choice("ab"), "answer": ""}, 3, Random(0))


def test_corpus_is_of_files_that_every_installation_has(tmp_path: Path) -> None:
    """Large enough sources at any depth; nothing under the folders that are skipped, which may have any name above."""
    root = tmp_path / "test"  # what lies above the library does not count
    wanted = [*(f"a{n:02}.py" for n in range(19)), "json/decoder.py"]
    skipped = [f"{folder}/x.py" for folder in sorted(SKIPPED_FOLDERS)] + ["json/tests/y.py"]
    for name in (*wanted, *skipped, "notes.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("#" * MIN_FILE_BYTES)
    (root / "short.py").write_text("#" * (MIN_FILE_BYTES - 1))
    assert [str(path.relative_to(root)) for path in source_files(root)] == wanted
    (root / "a00.py").unlink()
    with pytest.raises(RuntimeError, match="19 Python sources, expected at least 20"):
        source_files(root)


def test_pieces_of_text_begin_with_a_line_and_come_from_every_file(tmp_path: Path) -> None:
    for name in "abcd":
        lines = [f"{name}{number:02}\u00e9." for number in range(50)]
        (tmp_path / name).write_bytes("\r\n".join(lines).encode())
    rows = draw_text_rows([tmp_path / name for name in "abcd"], 200, 12, Random(0))
    assert {row["answer"][0] for row in rows} == set("abcd")
    assert all(re.match(r"[a-d]\d\d\. ?\n[a-d]\d\d\. ?", row["answer"]) for row in rows)
    assert all(len(row["answer"]) == 12 and row["prompt"] == "" for row in rows)


def test_corpus_refuses_an_installation_without_sources(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="0 Python sources"):
        source_files(tmp_path)


def test_the_small_model_is_used_where_it_is_asked_for_and_where_none_can_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []

    def fails(model: str) -> None:
        fetched.append(model)
        raise demo.NotFetched("no index")

    def small(settings: Any, folder: Any, seed: int) -> list[Any]:
        assert (settings.flag("seed"), folder.root, seed) == ("9", tmp_path / "out", 9)
        return ["runs"]

    monkeypatch.setattr(demo, "start_distributed", lambda seconds: None)
    monkeypatch.setattr(demo, "check_kernels", lambda method, arguments: None)
    monkeypatch.setattr(demo, "fetch", fails)
    monkeypatch.setattr(demo, "_run_small", small)
    flags = ["--output_dir", str(tmp_path / "out"), "--seed", "9", "--report_to", "none"]
    for more, tries in ((["--model_name_or_path", demo.EMBEDDED], 0), ([], 1)):
        runs, folder, comparison = demo.run_embedded(parse([*flags, *more]))
        assert (runs, folder.root, comparison) == (["runs"], tmp_path / "out", None)
        assert len(fetched) == tries
