"""Benchmarks of general ability: HumanEval's share, the completions that are kept, and who is asked what."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation import benchmarks, humaneval
from piece_ds.evaluation.humaneval import Problem

TEST = "def check(candidate):\n    assert candidate(2) == 3\n"
PROBLEMS = [Problem(f"HumanEval/{i}", f"def f{i}(x):\n", TEST, f"f{i}") for i in range(3)]
WRITTEN = ["    return x + 1\nprint(f0)", "\n    return x + 1\n\n    return 0", "    return x"]

# Scoring -> most tokens, completions as they are cut, and whether they pass.
CASES = {
    "piece": (512, ["    return x + 1", WRITTEN[1], "    return x"], [True, True, False]),
    "authors": (128, [WRITTEN[0], "    return x + 1", "    return x"], [False, True, False]),
}


@pytest.mark.parametrize("scoring", list(CASES))
def test_humanevals_share_and_its_file(scoring: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, cut, passes = CASES[scoring]
    asked = SimpleNamespace(humaneval=True, lm_eval_tasks=[], scoring=scoring, sample=True, sample_seed=7)
    settings: Any = SimpleNamespace(evaluation=asked, data=SimpleNamespace(cutoff="model"))
    seen: list[Any] = []

    def generate(
        model: Any, prompts: Any, tokenizer: Any, most: int, size: int, device: Any, how: Any, *, description: str
    ) -> Any:
        assert description == "HumanEval"
        seen.append((model, [tokenizer.decode(ids) for ids in prompts], most, size, device, how.sample, how.seed))
        return SimpleNamespace(texts=WRITTEN)

    def passed(problems: list[Problem], completions: list[str]) -> list[bool]:
        assert (problems, completions) == (PROBLEMS, cut)
        return passes

    monkeypatch.setattr(benchmarks, "generate_texts", generate)
    monkeypatch.setattr(benchmarks, "Encoder", lambda tokenizer, cutoff: SimpleNamespace(prompt_ids=tokenizer.encode))
    monkeypatch.setattr(humaneval, "load_problems", lambda: PROBLEMS)
    monkeypatch.setattr(humaneval, "passed", passed)
    found = benchmarks.run_benchmarks("model", make_tokenizer(64), 5, settings, "cpu", tmp_path)
    assert found == {"HumanEval pass@1": sum(passes) / 3}
    assert seen == [("model", [problem.prompt for problem in PROBLEMS], most, 5, "cpu", True, 7)]

    rows = [json.loads(line) for line in (tmp_path / "HumanEval.jsonl").read_text().splitlines()]
    assert rows == [
        {"task_id": problem.name, "completion": text, "passed": right}
        for problem, text, right in zip(PROBLEMS, cut, passes, strict=True)
    ]


def test_only_what_is_asked_for_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(humaneval, "check_humaneval", lambda: checked.append("humaneval"))
    monkeypatch.setattr(benchmarks, "check_harness", lambda *asked: checked.append(asked))

    def harness(
        model: str, tokenizer: Any, tasks: list[str], path: str, limit: int, batch_size: int, device: str
    ) -> dict[str, Any]:
        assert (model, tokenizer, batch_size, device) == ("model", rest[0], 5, "cpu")
        return {"arc": 0.25, "asked": (tasks, path, limit)}

    monkeypatch.setattr(benchmarks, "run_harness", harness)
    asked: Any = SimpleNamespace(humaneval=False, lm_eval_tasks=[], lm_eval_path="p", lm_eval_limit=9)
    settings: Any = SimpleNamespace(evaluation=asked)
    rest: Any = (make_tokenizer(64), 5, settings, "cpu", Path())
    benchmarks.check_ability(asked)
    assert (checked, benchmarks.run_benchmarks("model", *rest)) == ([], {})
    asked.lm_eval_tasks = ["arc"]
    benchmarks.check_ability(asked)
    assert checked == [(["arc"], "p")]
    assert benchmarks.run_benchmarks("model", *rest) == {"arc": 0.25, "asked": (["arc"], "p", 9)}
    asked.humaneval, asked.lm_eval_tasks = True, []
    benchmarks.check_ability(asked)
    assert checked[1:] == ["humaneval"]
