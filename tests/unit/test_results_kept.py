"""results.json grows task by task: ratios, costs, notes and divergences of a run as they come."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from piece_ds.config.settings import parse
from piece_ds.evaluation.evaluate import EvalResult
from piece_ds.report.results import RunResults
from piece_ds.training.results import (
    is_judged_before,
    num_finished,
    num_steps_before,
    open_results,
    with_before,
    with_before_of,
    with_divergence,
    with_task,
    with_validation,
)

# Two tensors, of which a task may touch one.
NUMEL = {"model.layers.0.mlp.up_proj.weight": 30, "model.norm.weight": 10}
INDEX = {"model.layers.0.mlp.up_proj.weight": torch.arange(8)}


def task_of(name: str, held_out: bool = True, validation: Any = None) -> Any:
    return SimpleNamespace(name=name, held_out=held_out, validation=validation, test=[0] * 3)


def opened(folder: Path, *flags: str) -> RunResults:
    settings = parse([*flags, "--seed", "3"])
    tasks = [task_of("a"), task_of("b", held_out=False)]
    return open_results(folder / "results.json", settings, tasks, {"a": "exact", "b": "text"}, resume=True)


def judged(loss: float) -> EvalResult:
    return EvalResult(score={"a": 0.5}, loss={"a": loss}, general_loss=2.0, seconds=4.0)


def finished(results: RunResults, task: str, **cost: Any) -> RunResults:
    return with_task(results, task, judged(1.5), cost=cost, index=INDEX, numel=NUMEL, log=[{"step": 1}])


@pytest.mark.parametrize(
    ("method", "at_first", "after", "name"),
    [
        ("piece-s", 0.05, 0.05, "piece-s 5 %"),
        ("hft", 1.0, 0.2, "hft"),  # it decides itself: known once it has selected, and of the whole model
        ("layernorm", 1.0, 0.2, "layernorm"),
        ("seqft", 1.0, 1.0, "seqft"),
    ],
)
def test_the_ratio_is_that_asked_for_or_what_the_method_took_of_the_whole_model(
    method: str, at_first: float, after: float, name: str, tmp_path: Path
) -> None:
    results = opened(tmp_path, "--method", method, "--mask_ratio", "0.05")
    assert (results.name, results.method, results.ratio) == (name, method, at_first)
    assert finished(results, "a").ratio == pytest.approx(after)


def test_a_run_grows_task_by_task(tmp_path: Path) -> None:
    results = opened(tmp_path)
    assert (num_finished(results), num_steps_before(results), is_judged_before(results)) == (0, 0, False)
    assert results.notes == ["b was judged on rows it trained on: it has no held-out ones."]
    assert results.rows == {"a": 3, "b": 3}
    results = with_before(results, judged(3.0))
    assert (num_finished(results), is_judged_before(results)) == (0, True)
    for number, task in enumerate(("a", "b"), start=1):
        results = finished(results, task, num_steps=7)
        assert (num_finished(results), num_steps_before(results)) == (number, 7 * number)
    assert set(results.logs) == set(results.masks) == set(results.cost) == {"a", "b"}
    assert results.cost["b"] == {"num_steps": 7, "evaluate_seconds": 4.0}
    assert results.matrix.loss.before == (3.0, None)
    # Without a mask there is none to count.
    assert with_task(opened(tmp_path), "a", judged(1.0), cost={}, index=None, numel=NUMEL, log=[]).masks == {}


def test_a_compared_run_takes_over_the_row_before_any_task_alone(tmp_path: Path) -> None:
    of_base = EvalResult(
        score={"a": 0.25, "b": 0.75}, loss={"a": 3.0, "b": 4.0}, general_loss=2.5, seconds=1.0,
        measures={"a": {"f1": 0.5}}, ability={"arc": 0.375},
    )  # fmt: skip
    judged_run = with_before(opened(tmp_path), of_base)
    other = with_task(judged_run, "a", judged(2.0), cost={}, index=None, numel=NUMEL, log=[{"step": 1}])
    other = replace(
        other, measures={**other.measures, "after a": {"a": {"f1": 1.0}}}, ability={**other.ability, "x": {}}
    )
    assert with_before_of(opened(tmp_path), other) == judged_run

    # Another stream, or a run that judged nothing, is no base to stand on.
    with pytest.raises(AssertionError):
        with_before_of(replace(opened(tmp_path), rows={"a": 3, "b": 4}), other)
    with pytest.raises(AssertionError):
        with_before_of(opened(tmp_path), opened(tmp_path))


def test_only_rows_that_chose_a_step_and_judge_it_make_a_note(tmp_path: Path) -> None:
    results = opened(tmp_path)
    for found, validation, is_noted in (
        ({"used_step": 2, "last_step": 4, "stopped_early": False}, None, True),
        ({"used_step": 4, "last_step": 4, "stopped_early": True}, None, True),
        ({"used_step": 4, "last_step": 4, "stopped_early": False}, None, False),
        ({"used_step": 2, "last_step": 4, "stopped_early": False}, "rows of its own", False),
    ):
        after = with_validation(results, task_of("a", validation=validation), found)
        assert after.validation == {"a": found}
        assert (len(after.notes) > len(results.notes)) == is_noted, found
    assert with_validation(results, task_of("a"), None) is results


def test_divergences_are_kept_by_their_moment(tmp_path: Path) -> None:
    results = with_divergence(opened(tmp_path), "after a", {"a": 0.5})
    results = with_divergence(results, "after b", {"a": 0.75})
    assert results.divergence == {"after a": {"a": 0.5}, "after b": {"a": 0.75}}
    assert with_divergence(results, "after c", {}) is results
