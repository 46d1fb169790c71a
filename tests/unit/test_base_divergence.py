"""How far the model has moved from the base model, on held-out rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import PlainEngine, make_model, moved
from support.ranks import on_ranks

from piece_ds.data.collate import Collator
from piece_ds.report.results import GENERAL_TEXT
from piece_ds.training.base_divergence import BaseDivergence

# Rows of different lengths; "silent" has no answer, and the third row of "a" is beyond the first six answer tokens.
ROWS: dict[str, list[dict[str, Any]]] = {
    "a": [{"input_ids": [1, *range(7, 7 + n)], "labels": [-100, -100, *range(8, 7 + n)]} for n in (4, 5, 3)],
    "b/odd name": [{"input_ids": [1, 9, 11, 12], "labels": [-100, 9, 11, 12]}],
    "silent": [{"input_ids": [1, 9], "labels": [-100, -100]}],
    GENERAL_TEXT: [{"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7]}] * 2,
}


def make(folder: Path, num_tokens: int = 6, rows: Any = ROWS) -> BaseDivergence:
    return BaseDivergence(rows=rows, collate=Collator(0), batch_size=1, num_tokens=num_tokens, folder=folder)


def by_hand(rows: list[dict[str, Any]]) -> float:
    """Return the mean over the answer tokens of rows of KL(base || moved), row by row, in fp64."""
    base, model, found = make_model("llama"), moved(make_model("llama")), []
    for row in rows:
        counted = torch.tensor(row["labels"][1:]) != -100
        p, q = (m(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1][counted].double() for m in (base, model))
        found.append((p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1))
    return torch.cat(found).mean().item()


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(6, 2), (8, 3)])
def test_divergence_is_the_textbooks_on_the_first_answer_tokens_for_any_number_of_ranks(
    tmp_path: Path, num_tokens: int, num_rows: int
) -> None:
    """Also of three rows on two ranks, one of which repeats a row that must not count twice."""

    def measure() -> dict[str, float]:
        folder = tmp_path / str(torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        make(folder, num_tokens).begin(PlainEngine(make_model("llama")))
        # Another object reads what the first has kept, as a resumed run does.
        return make(folder, num_tokens).of(PlainEngine(moved(make_model("llama"))), ["a", "silent"])

    want = {"a": by_hand(ROWS["a"][:num_rows]), GENERAL_TEXT: by_hand(ROWS[GENERAL_TEXT])}
    for got in (*on_ranks(1, measure), *on_ranks(2, measure)):
        assert got == pytest.approx(want, rel=1e-4)


def test_a_model_that_has_not_moved_diverges_by_nothing(tmp_path: Path) -> None:
    engine = PlainEngine(make_model("llama"))
    make(tmp_path).begin(engine)
    assert make(tmp_path).of(engine, ["a", "b/odd name"]) == {"a": 0.0, "b/odd name": 0.0, GENERAL_TEXT: 0.0}


def test_what_was_not_kept_is_left_out(tmp_path: Path) -> None:
    engine = PlainEngine(make_model("llama"))
    assert make(tmp_path).of(engine, ["a"]) == {}
    make(tmp_path, num_tokens=0).begin(engine)
    assert make(tmp_path, num_tokens=0).of(engine, ["a"]) == {}
    assert not list(tmp_path.rglob("*.bin"))

    # Kept of other rows than are asked for now.
    make(tmp_path).begin(engine)
    other = {**ROWS, "a": ROWS["a"][1:]}
    assert set(make(tmp_path, rows=other).of(engine, ["a", "b/odd name"])) == {"b/odd name", GENERAL_TEXT}
