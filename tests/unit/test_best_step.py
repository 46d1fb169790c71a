"""Which evaluation of a task is its best one, and when training ends early: as transformers decides, and resumably."""

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState
from transformers.trainer_utils import SaveStrategy

from piece_ds.training.best_step import Evaluation, Rule, best_of, evaluations_in

NAN = math.nan


def curve(*losses: float, scores: tuple[float, ...] = (), rises: tuple[float, ...] = ()) -> list[Evaluation]:
    return [
        Evaluation(step, loss, scores[step - 1] if scores else None, rises[step - 1] if rises else None)
        for step, loss in enumerate(losses, 1)
    ]


def best_step(evaluations: list[Evaluation], rule: Rule) -> int | None:
    best, _ = best_of(evaluations, rule)
    return None if best is None else best.step


def test_the_best_step_by_each_measure() -> None:
    losses = (3.0, 2.0, NAN, 1.0, 1.0)
    assert best_step(curve(*losses), Rule()) == 4  # of equals the first
    assert best_step(curve(*losses, scores=(0.5, 0.7, 0.9, 0.7, 0.1)), Rule("score", True)) == 3
    assert best_step(curve(NAN, math.inf), Rule()) is None
    assert best_step([Evaluation(0, 0.0), *curve(3.0, 2.0)], Rule()) == 2  # before the first step there is no task


def test_within_the_budget_the_lower_loss_wins_and_outside_it_the_smaller_rise() -> None:
    rule = Rule("loss_within_budget", budget=0.1)
    assert best_step(curve(3.0, 2.0, 1.0, rises=(0.0, 0.1, 0.2)), rule) == 2
    assert best_step(curve(3.0, 2.0, 1.0, rises=(0.3, 0.2, 0.4)), rule) == 2
    assert best_step(curve(3.0, 2.0, 1.0, rises=(0.3, NAN, 0.4)), rule) == 1
    assert best_step(curve(3.0, NAN, 1.0, rises=(0.0, 0.0, 0.4)), rule) == 1

    # What was not measured to begin with holds nobody back.
    for first in (NAN, math.inf, -math.inf):
        assert best_step(curve(3.0, 2.0, rises=(first, 0.3)), rule) == 2
        assert best_step(curve(first, 2.0, rises=(0.0, 0.3)), rule) == 2
    assert best_step([Evaluation(1, 3.0), Evaluation(2, 2.0, general_rise=0.3)], rule) == 2
    assert best_step([Evaluation(1, 3.0)], rule) is None


def test_patience_counts_evaluations_without_a_gain_of_the_threshold() -> None:
    losses = (3.0, 2.95, 2.9, 2.85, 2.0, 2.1)
    assert [best_of(curve(*losses[:n]), Rule(threshold=0.08))[1] for n in range(1, 7)] == [0, 1, 2, 3, 0, 1]
    assert [best_of(curve(*(NAN, 2.0, NAN)[:n]), Rule())[1] for n in range(1, 4)] == [0, 0, 1]  # the first is free
    within = Rule("loss_within_budget", budget=0.1, threshold=1.0)
    assert best_of(curve(3.0, 2.9, 2.8, rises=(0.2, 0.1, 0.0)), within)[1] == 1  # into the budget is a gain


@pytest.mark.parametrize("metric", ["loss", "score"])
def test_transformers_decides_alike(metric: str) -> None:
    """Its EarlyStoppingCallback and its choice of the best, on curves with repeated and NaN values."""
    draw = random.Random(metric)
    for _ in range(200):
        greater, threshold, patience = metric == "score", draw.choice([0.0, 0.1, 0.3]), draw.randint(1, 4)
        values = [draw.choice([0.1, 0.2, 0.35, 0.5, 0.5, 0.8, NAN]) for _ in range(8)]
        rule = Rule(metric, greater, patience=patience, threshold=threshold)
        state, control = TrainerState(), TrainerControl()
        arguments: Any = SimpleNamespace(
            metric_for_best_model=metric, greater_is_better=greater, save_strategy=SaveStrategy.BEST
        )
        trainer: Any = SimpleNamespace(args=arguments, state=state)
        stopping, has_stopped = EarlyStoppingCallback(patience, threshold), False
        for step, value in enumerate(values, 1):
            state.global_step, metrics = step, {f"eval_{metric}": value}
            stopping.on_evaluate(arguments, state, control, metrics)
            Trainer._determine_best_metric(trainer, metrics, None)
            others = [0.0] * step
            seen = curve(*(values[:step] if metric == "loss" else others), scores=tuple(values[:step]))
            best, num_without_gain = best_of(seen, rule)
            if not all(map(math.isnan, values[:step])):  # a NaN to begin with is a gain to transformers
                assert (best and best.step) == state.best_global_step, (values[:step], greater)
            has_stopped |= num_without_gain >= patience
            if not math.isnan(values[0]):
                assert has_stopped == control.should_training_stop, (values[:step], threshold)


def test_a_trainers_log_gives_the_curve_once_a_step() -> None:
    log: list[dict[str, Any]] = [
        {"eval_general_loss_before": 2.0, "step": 0},
        {"loss": 1.0, "step": 1},
        {"eval_loss": 0.9, "eval_general_loss": 2.25, "step": 1},
        {"eval_loss": 0.8, "eval_score": 0.5, "step": 2},
        {"eval_loss": 7.0, "step": 2},
    ]
    assert evaluations_in(log) == [Evaluation(1, 0.9, None, 0.25), Evaluation(2, 0.8, 0.5)]
    assert evaluations_in(log)[0].to_json() == {"step": 1, "loss": 0.9, "general_rise": 0.25}
    assert Evaluation(3, NAN).to_json() == {"step": 3, "loss": None}
