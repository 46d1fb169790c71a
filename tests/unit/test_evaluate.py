"""Which prompts, gold answers and limits meet which scorer in an evaluation, in which row it ends, and what it cost."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from support.fakes import faked
from transformers import PreTrainedTokenizerFast

from piece_ds.cli import evaluate as command
from piece_ds.data.tasks import Task
from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation import evaluate
from piece_ds.evaluation.evaluate import EvalResult, evaluate_tasks
from piece_ds.evaluation.generate import Decoding, Generated

SHORT, LONG = 3, 40
MODEL, ROWS = object(), 2  # of a forward pass


def make_task(name: str, prompts: list[str], answers: list[str], references: list[list[str]]) -> Task:
    tokenizer = make_tokenizer(64)
    ids = [
        (tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [prompt + answer for prompt, answer in ids],
            "labels": [[-100] * len(prompt) + answer for prompt, answer in ids],
        }
    )
    train, held_out, test = (rows.select(range(len(rows))) for _ in range(3))  # apart: only those of test count
    return Task(name, train, held_out, test, answers, prompts, references=references)


TASKS = [
    make_task("letters", ["1?", "2?", "3?", "4?"], ["A", "B", "A", "B"], []),
    make_task("why", ["a?", "b?"], ["A", "B"], []),
    make_task("rows", ["x"], ["y"], []),
    make_task("seen", ["what?", "where?"], ["cat", "dog"], [["cat", "puss"], ["dog"]]),
]
SCORERS = {"letters": "letter", "why": "reasons", "rows": "loss", "seen": "vqa"}
OUTPUTS = {
    "letters": ["A", "B", "A", "A"],
    "why": ["A, because", "no"],
    "seen": ["puss", "cow"],
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[str], int]]:
    """Task -> prompts and most new tokens, as generate_texts() got them."""
    found: dict[str, tuple[list[str], int]] = {}

    def answer(
        model: Any,
        prompts: Any,
        tokenizer: PreTrainedTokenizerFast,
        most: int,
        batch_size: int,
        device: str,
        decoding: Decoding,
        *,
        description: str,
        batch_of: Any,
    ) -> Generated:
        assert (model, batch_size, device, batch_of) == (MODEL, ROWS, "cpu", None)
        assert decoding == Decoding(sample=True, seed=1)
        task = description.removeprefix("answers to ")
        found[task] = [tokenizer.decode(prompt) for prompt in prompts], most
        return Generated(OUTPUTS[task], num_tokens=10 * len(prompts), seconds=2.0)

    losses = {id(task.test): float(place) for place, task in enumerate(TASKS, 1)}

    def loss(model: Any, rows: Any, collate: Any, batch_size: int, device: str) -> SimpleNamespace:
        assert (model, batch_size, device) == (MODEL, ROWS, "cpu")
        assert set(collate([{"input_ids": [1], "labels": [1]}])) >= {"input_ids", "labels"}
        return SimpleNamespace(mean=losses.get(id(rows), 9.0))

    def benchmarks(
        model: Any, tokenizer: Any, batch_size: int, settings: Any, device: str, folder: Path
    ) -> dict[str, float]:
        assert (model, batch_size, device, settings.data.max_new_tokens) == (MODEL, ROWS, "cpu", SHORT)
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        assert folder.is_dir()
        return {"law": 0.5}

    monkeypatch.setattr(evaluate, "generate_texts", answer)
    monkeypatch.setattr(evaluate, "evaluate_loss", loss)
    monkeypatch.setattr(evaluate, "run_benchmarks", benchmarks)
    return found


def run(tmp_path: Path, scoring: str) -> EvalResult:
    settings: Any = SimpleNamespace(
        evaluation=SimpleNamespace(scoring=scoring, max_new_tokens_text=LONG, sample=True, sample_seed=1),
        data=SimpleNamespace(max_new_tokens=SHORT),
    )
    general = datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    return evaluate_tasks(MODEL, make_tokenizer(64), TASKS, SCORERS, general, ROWS, settings, "cpu", tmp_path)


def test_each_task_has_its_own_loss_score_and_predictions(
    tmp_path: Path, asked: dict[str, tuple[list[str], int]]
) -> None:
    result = run(tmp_path, "clean")
    assert result.loss == {"letters": 1.0, "why": 2.0, "rows": 3.0, "seen": 4.0}
    assert result.score == {"letters": 0.75, "why": 0.5, "rows": None, "seen": 0.5}
    assert result.measures == {"seen": {"exact_match": 0.5}}
    assert (result.general_loss, result.ability) == (9.0, {"law": 0.5})
    lines = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert lines == [
        {"prompt": "what?", "answer": ["cat", "puss"], "output": "puss"},
        {"prompt": "where?", "answer": "dog", "output": "cow"},
    ]
    assert not (tmp_path / "rows.jsonl").exists()


def test_prompts_are_those_of_the_test_rows_and_answers_as_long_as_their_scorer_reads(
    tmp_path: Path, asked: dict[str, tuple[list[str], int]]
) -> None:
    """The authors let ScienceQA's letters be followed by reasons."""
    for scoring, of_reasons in (("clean", SHORT), ("authors", LONG)):
        run(tmp_path, scoring)
        assert asked == {
            "letters": (["1?", "2?", "3?", "4?"], SHORT),
            "why": (["a?", "b?"], of_reasons),
            "seen": (["what?", "where?"], SHORT),
        }


def test_speed_is_that_of_generation_alone(tmp_path: Path, asked: dict[str, tuple[list[str], int]]) -> None:
    result = run(tmp_path, "clean")
    assert (result.num_tokens, result.generate_seconds) == (80, 6.0)
    assert EvalResult({}, {}, None, seconds=10.0, num_tokens=60, generate_seconds=4.0).cost == {
        "evaluate_seconds": 10.0,
        "generated_tokens_per_second": 15.0,
    }
    assert EvalResult({}, {}, None, seconds=10.0).cost == {"evaluate_seconds": 10.0}


def test_the_command_writes_the_answers_beside_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = SimpleNamespace(per_device_eval_batch_size=ROWS, device="cpu")
    settings: Any = SimpleNamespace(model=SimpleNamespace(loss_chunk_tokens=0), shown=lambda: {"seed": 3})
    inputs = SimpleNamespace(
        settings=settings,
        arguments=arguments,
        output_file=tmp_path / "mine.json",
        dtype="fp32",
        config="config",
        tokenizer="tokenizer",
        tasks=TASKS[:1],
        scorers={"letters": "letter", "why": "text"},
        general="general",
    )
    found = EvalResult({"letters": 2.0}, {"letters": 0.5, "why": 0.25}, 1.5, 9.0, {}, {"law": 0.5}, 30, 3.0)

    names = ("preflight", "load_model", "install_chunked_loss", "inference_model", "reads_images", "evaluate_tasks")
    fakes = faked(monkeypatch, command, *names)
    fakes.preflight.return_value, fakes.inference_model.return_value = inputs, MODEL
    fakes.reads_images.return_value, fakes.evaluate_tasks.return_value = True, found
    assert command.evaluate(settings)[0] is found
    fakes.evaluate_tasks.assert_called_once_with(
        *(MODEL, "tokenizer", TASKS[:1]),
        scorers=inputs.scorers,
        general="general",
        batch_size=ROWS,
        settings=settings,
        device="cpu",
        folder=tmp_path / "mine-predictions",
    )
    written = json.loads((tmp_path / "mine.json").read_text())
    assert (written["loss"], written["score"], written["general_loss"]) == (found.loss, found.score, 1.5)
    assert written["accuracy"] == {"letters": 0.5, "why": None}
    assert (written["ability"], written["settings"]) == ({"law": 0.5}, {"seed": 3})


@pytest.mark.parametrize("has_images", [False, True])
def test_the_command_prepares_the_model_as_the_flags_say(
    has_images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reads, runs or writes takes no arguments but those that the real one takes."""
    names = ("preflight", "load_model", "install_chunked_loss", "inference_model", "reads_images", "check_rows")
    fakes = faked(monkeypatch, command, *names, "evaluate_tasks", "write_json", "barrier")
    given: Any = SimpleNamespace(model="as given")
    checked: Any = SimpleNamespace(model=SimpleNamespace(loss_chunk_tokens=64), shown=dict)
    arguments = SimpleNamespace(per_device_eval_batch_size=1, device="cpu")
    rows, tokenizer = (
        datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]}),
        make_tokenizer(64),
    )
    tasks = [SimpleNamespace(test=rows), SimpleNamespace(test=None)]
    fakes.preflight.return_value = SimpleNamespace(
        settings=checked,
        arguments=arguments,
        output_file=tmp_path / "out.json",
        dtype=torch.bfloat16,
        config="config",
        tokenizer=tokenizer,
        tasks=tasks,
        scorers={"a": "text"},
        general=None,
    )
    fakes.reads_images.return_value = has_images
    fakes.evaluate_tasks.return_value = EvalResult({}, {}, None, 1.0)
    assert command.evaluate(given) == (EvalResult({}, {}, None, 1.0), {"a": "(BLEU-4 + ROUGE-L) / 2"})
    fakes.preflight.assert_called_once_with(given, command.EVALUATE)
    fakes.load_model.assert_called_once_with(checked.model, torch.bfloat16)
    fakes.install_chunked_loss.assert_called_once_with(fakes.load_model.return_value, 64)
    fakes.inference_model.assert_called_once_with(fakes.load_model.return_value, arguments)
    fakes.reads_images.assert_called_once_with("config")
    assert len(fakes.check_rows.mock_calls) == (not has_images)  # words alone are padded
    for call in fakes.check_rows.mock_calls:
        assert call.args[0] is fakes.inference_model.return_value
        assert (list(call.args[1]), *call.args[2:]) == ([6, 7], tokenizer.pad_token_id, True)
    fakes.barrier.assert_called_once_with()
    fakes.inference_model.return_value.empty_partition_cache.assert_called_once_with()
    fakes.inference_model.return_value.destroy.assert_called_once_with()


def test_the_command_prints_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = EvalResult(
        *({"a": 2.0, "b": 0.5}, {"a": 0.25, "b": None}, 1.5, 9.0),
        measures={"a": {"exact_match": 0.125}},
        ability={"law": 0.75},
        num_tokens=30,
        generate_seconds=3.0,
    )
    asked: list[Any] = []
    monkeypatch.setattr(
        command, "evaluate", lambda settings: asked.append(settings) or (result, {"a": "accuracy", "b": "loss"})
    )
    command.main(["--model_name_or_path", "m", "--max_new_tokens", "9"])
    assert [settings.data.max_new_tokens for settings in asked] == [9]
    assert capsys.readouterr().out.splitlines() == [
        "a: loss 2.0000, accuracy 25.00%, exact_match 12.50%",
        "b: loss 0.5000",
        "general text: loss 1.5000",
        "law: 0.7500",
        "generated: 30 tokens, 10 a second",
    ]
    faked(monkeypatch, command, "methods_help").methods_help.return_value = "words-of-every-method"
    command.main(["--help"])
    assert "words-of-every-method" in capsys.readouterr().out
    assert len(asked) == 1
    monkeypatch.setattr(command, "evaluate", lambda settings: (EvalResult({}, {}, None, 1.0), {}))
    command.main(["--model_name_or_path", "m"])
    assert capsys.readouterr().out == ""
