"""What is measured on held-out rows while a task trains: no more than the rule for the best step needs."""

from types import SimpleNamespace
from typing import Any

import pytest

from piece_ds.training import validation as module
from piece_ds.training.best_step import GENERAL_BEFORE, Rule
from piece_ds.training.validation import Validation

LOSSES = {"held out": 2.0, "general": 3.0}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Losses by the name of the rows, and a score of 0.75; all calls are kept."""
    calls: list[Any] = []

    def loss(engine: Any, rows: str, collate: Any, batch_size: int, device: str) -> Any:
        calls.append((rows, batch_size, device))
        return SimpleNamespace(mean=LOSSES[rows])

    def score(engine: Any, tokenizer: str, task: Any, scorer: str, batch_size: int, settings: str, device: str) -> Any:
        calls.append((tokenizer, scorer, batch_size, settings, device))
        return None, {"score": 0.75}

    monkeypatch.setattr(module, "make_collator", lambda tokenizer: None)
    monkeypatch.setattr(module, "evaluate_loss", loss)
    monkeypatch.setattr(module, "score_task", score)
    return calls


# Rule -> what it needs beside the loss on held-out rows, which is always there, and who is asked for it.
HELD_OUT, GENERAL = ("held out", 5, "cpu"), ("general", 5, "cpu")
SCORE = ("tokenizer", "letter", 5, "settings", "cpu")
NEEDS: list[tuple[Rule | None, dict[str, float], list[Any]]] = [
    (None, {}, [HELD_OUT]),
    (Rule("loss"), {}, [HELD_OUT]),
    (Rule("score", True), {"eval_score": 0.75}, [HELD_OUT, SCORE]),
    (Rule("loss_within_budget", budget=0.1), {"eval_general_loss": 3.0}, [HELD_OUT, GENERAL]),
]


@pytest.mark.parametrize(("rule", "also", "calls"), NEEDS)
def test_a_rule_gets_what_it_decides_by_and_nothing_else(
    rule: Rule | None, also: dict[str, float], calls: list[Any], asked: list[Any]
) -> None:
    general: Any = "general" if GENERAL in calls else None
    parts: Any = {"task": SimpleNamespace(test="held out"), "tokenizer": "tokenizer", "settings": "settings"}
    measured = Validation(**parts, scorer="letter", batch_size=5, rule=rule, general=general, loads_best=True)
    engine = SimpleNamespace(device="cpu")
    found = measured.measure(engine)
    assert found.pop("eval_runtime") >= 0
    assert found == {"eval_loss": 2.0, **also}
    assert asked == calls

    # Before the first step a budget needs what general text costs the base model.
    asked.clear()
    assert measured.measure_before(engine) == ({GENERAL_BEFORE: 3.0} if general else {})
    assert asked == ([GENERAL] if general else [])
