"""The scale of a task that a forgetting budget allows: on curves of which the answer is known."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from support.models import make_model
from torch import nn

from piece_ds.config.method_arguments import BaselineArguments
from piece_ds.config.settings import parse
from piece_ds.deltas.dense import DenseChange, _shard
from piece_ds.evaluation.forgetting_budget import MAX_TRIALS, Trial, search_scale
from piece_ds.evaluation.loss import LossResult
from piece_ds.methods.lora import merged
from piece_ds.methods.registry import METHODS
from piece_ds.models.layout import layout_of
from piece_ds.preflight.general_flags import check_general_flags
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.training import forgetting
from piece_ds.training.forgetting import ForgettingBudget, limit_forgetting, masked_change
from piece_ds.zero.weights import read_selected


def curve(
    loss: Callable[[float], float],
    score: Callable[[float], float | None] = lambda alpha: None,
    error: Callable[[float], float] = lambda alpha: 0.0,
) -> Callable[[float], Trial]:
    def measure(alpha: float) -> Trial:
        assert 0 < alpha <= 1  # alpha 0 is known
        return Trial(alpha, loss(alpha), score(alpha), error(alpha))

    return measure


def test_a_task_that_fits_is_kept_whole_after_one_trial() -> None:
    found = search_scale(curve(lambda alpha: 3 + 0.01 * alpha), before=3.0, budget=0.02)
    assert (found.alpha, len(found.trials)) == (1.0, 1)
    assert found.rise == pytest.approx(0.01)
    # A rise of exactly the budget keeps it: also no rise at all, where none is allowed.
    for rise in (0.0, 0.25):
        found = search_scale(curve(lambda alpha, rise=rise: 3 + rise * alpha), before=3.0, budget=rise)
        assert (found.alpha, len(found.trials)) == (1.0, 1)


@pytest.mark.parametrize("limit", [0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.6, 0.74, 0.8, 0.9, 0.99])
def test_on_a_rising_curve_the_limit_is_found_to_a_sixteenth(limit: float) -> None:
    found = search_scale(curve(lambda alpha: 2 + alpha**2), before=2.0, budget=limit**2)
    assert found.alpha <= limit + 1e-12
    assert limit - found.alpha <= 1 / 16 + 1e-12
    assert len(found.trials) <= MAX_TRIALS
    assert len({trial.alpha for trial in found.trials}) == len(found.trials)  # none is paid for twice


def test_when_nothing_fits_alpha_is_zero() -> None:
    for loss in (lambda alpha: 5.0, lambda alpha: math.nan, lambda alpha: math.inf):
        found = search_scale(curve(loss), before=2.0, budget=0.1)
        assert (found.alpha, found.rise, len(found.trials)) == (0.0, 0.0, MAX_TRIALS)
        assert all(trial["general_loss"] in (5.0, None) for trial in found.to_json()["trials"])


def test_on_a_curve_that_is_not_monotone_only_what_was_measured_counts() -> None:
    """Fits at 1 and at 0.5, not between: 1 is right. Fits at 0.5 alone of the grid: never more than was tried."""
    assert search_scale(curve(lambda alpha: 3 + math.sin(math.pi * alpha * 2) ** 2), 3.0, 0.1).alpha == 1.0
    bumpy = {1.0: 9.0, 0.75: 9.0, 0.5: 3.0, 0.625: 9.0, 0.5625: 3.05, 0.59375: 9.0}
    found = search_scale(curve(lambda alpha: bumpy[alpha]), before=3.0, budget=0.1)
    assert found.alpha == 0.5625
    assert bumpy[found.alpha] - 3.0 <= 0.1


def test_negative_rises_fit_a_budget_of_zero() -> None:
    assert search_scale(curve(lambda alpha: 3 - alpha), before=3.0, budget=0.0).alpha == 1.0


def test_the_best_validation_score_within_the_budget_wins() -> None:
    scores = {1.0: 0.9, 0.75: 0.6, 0.5: 0.8, 0.25: 0.3}
    found = search_scale(curve(lambda alpha: 2 + alpha, lambda alpha: scores.get(alpha, 0.5)), before=2.0, budget=0.8)
    assert found.alpha == 0.5  # 1 does not fit, 0.75 and what lies above score less
    assert len(found.trials) <= MAX_TRIALS
    ties = search_scale(curve(lambda alpha: 2 + alpha, lambda alpha: 0.5), before=2.0, budget=0.8)
    assert ties.alpha == max(trial.alpha for trial in ties.trials if trial.alpha <= 0.8)
    assert search_scale(curve(lambda alpha: 2.0, lambda alpha: math.nan), before=2.0, budget=0.1).alpha == 1.0


def test_a_rise_fits_only_with_its_standard_error() -> None:
    """A rise of alpha / 10 that is uncertain by as much: half of what would fit if it were known exactly."""
    found = search_scale(curve(lambda alpha: 2 + alpha / 10, error=lambda alpha: alpha / 10), before=2.0, budget=0.1)
    assert found.alpha == 0.5
    assert found.to_json()["trials"][0]["standard_error"] == pytest.approx(0.05)
    # Rows of which nothing can be worked out fit nothing.
    assert search_scale(curve(lambda alpha: 2.0, error=lambda alpha: math.nan), before=2.0, budget=0.1).alpha == 0.0


def test_few_rows_that_differ_keep_less_than_many_that_agree() -> None:
    """All rise by 0.1 alpha on average; where rows differ by 0.2 alpha, four of them leave 0.12 alpha of doubt."""
    kept = {}
    for name, per_row in (("agree", (0.1, 0.1, 0.1, 0.1)), ("differ", (0.3, -0.1, 0.3, -0.1))):
        alphas: list[float] = []

        def loss(
            text: datasets.Dataset, alphas: list[float] = alphas, per_row: Sequence[float] = per_row
        ) -> LossResult:
            batches = tuple((10 * (2 + alphas[-1] * rise), 10) for rise in per_row)
            return LossResult(sum(one for one, _ in batches), 40, batches)

        rows = datasets.Dataset.from_list([{"row": row} for row in range(8)])
        found = limit_forgetting(SimpleNamespace(set_=alphas.append), rows=rows, loss=loss, budget=0.11)
        kept[name] = found["delta_scale"]
        for trial in found["curve"]["trials"]:
            doubt = 0.0 if name == "agree" else 0.2 / math.sqrt(3) * trial["alpha"]
            assert trial["standard_error"] == pytest.approx(doubt, abs=1e-12)
    assert kept == {"agree": 1.0, "differ": 0.5}


def test_trials_are_never_more_than_asked() -> None:
    for max_trials in range(1, 9):
        for budget in (0.0, 0.3, 2.0):
            found = search_scale(curve(lambda alpha: 1 + alpha, lambda alpha: alpha), 1.0, budget, max_trials)
            assert len(found.trials) <= max_trials


def test_what_is_no_budget_is_refused() -> None:
    for before, budget in ((math.nan, 0.1), (1.0, -0.1), (1.0, math.inf), (math.inf, 0.1)):
        with pytest.raises(ValueError, match="expected a finite loss"):
            search_scale(curve(lambda alpha: 1.0), before, budget)
    for max_trials in (0, -1):
        with pytest.raises(ValueError, match=f"expected at least one trial, got {max_trials}"):
            search_scale(curve(lambda alpha: 1.0), 1.0, 0.1, max_trials)


def trained() -> tuple[nn.Linear, SimpleNamespace]:
    """A model whose selected weights have moved from 1 to 3, and its mask as a task leaves it."""
    model = nn.Linear(4, 3, bias=False)
    model.weight.data.fill_(1.0)
    mask = Mask(layout_of(model), {"weight": torch.tensor([0, 5, 11])}, 3)
    task = SimpleNamespace(mask=mask, previous=read_selected(model, mask), scale=1.0, unscaled=None)
    model.weight.data.view(-1)[[0, 5, 11]] = 3.0
    return model, task


@pytest.mark.parametrize(("budget", "alpha"), [(0.0, 0.0), (0.3, 0.125), (1.2, 0.59375), (5.0, 1.0)])
def test_a_live_model_is_scaled_and_the_whole_task_kept_beside_it(budget: float, alpha: float) -> None:
    model, task = trained()
    rows = datasets.Dataset.from_list([{"row": row} for row in range(5)])
    seen = []

    def loss(text: datasets.Dataset) -> LossResult:
        seen.append(tuple(text["row"]))
        apart = 10 if 1 in text["row"] else 0  # what is only reported must not be searched on
        return LossResult(apart + float(model.weight.data.view(-1)[5]), 1)  # 1 + 2 alpha

    live = masked_change(SimpleNamespace(module=model), task.mask, task.previous, read_selected(model, task.mask))
    found = limit_forgetting(live, rows=rows, loss=loss, budget=budget)
    assert set(seen) == {(0, 2, 4), (1, 3)}  # no row is in both
    assert found["delta_scale"] == alpha
    expected = [1 + 2 * alpha if i in (0, 5, 11) else 1.0 for i in range(12)]
    assert model.weight.data.view(-1).tolist() == expected
    for half, apart in (("search", 0), ("report", 10)):
        after = pytest.approx(apart + 1 + 2 * alpha)
        assert found[half] == {"before": apart + 1.0, "after": after, "unscaled": apart + 3.0}


@pytest.mark.parametrize(("num_rows", "rows_together"), [(64, 2), (96, 3), (960, 3), (12, 1)])
def test_a_budget_searches_on_one_half_of_the_text_and_tells_of_the_other(
    num_rows: int, rows_together: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Losses of the halves are 2 + alpha and 7 + 4 alpha; the first one's batches rise unequally."""
    alphas: list[float] = []
    judged = datasets.Dataset.from_list([{"row": row} for row in range(num_rows)])

    def measured(engine: Any, rows: Any, collate: Any, batch_size: int, device: Any) -> LossResult:
        assert (engine.name, collate, device) == ("an engine", "a collator", "a device")
        assert batch_size == rows_together  # at least 16 batches, though 3 rows would fit
        alpha = alphas[-1]
        if 1 in rows["row"]:
            return LossResult(10 * (7 + 4 * alpha), 10)
        return LossResult(10 * (2 + alpha), 10, ((5 * (2 + 0.75 * alpha), 5), (5 * (2 + 1.25 * alpha), 5)))

    monkeypatch.setattr(forgetting, "evaluate_loss", measured)
    monkeypatch.setattr(forgetting, "make_collator", lambda tokenizer: "a collator")
    tokenizer: Any = None
    budget = ForgettingBudget(nats=0.625, tokenizer=tokenizer, judged=judged, validated=None, batch_size=3)
    found = budget.limit(SimpleNamespace(name="an engine", device="a device"), SimpleNamespace(set_=alphas.append))
    assert found["delta_scale"] == alphas[-1] == 0.5
    assert found["report"] == {"before": 7.0, "after": 9.0, "unscaled": 11.0}
    assert "budget 0.625 nats: 0.5 of the task's change is kept, the rise is uncertain by 0.1250;" in caplog.text
    assert "7.0000 before, 9.0000 after (11.0000 with the whole change)" in caplog.text


def test_text_without_a_finite_loss_is_refused() -> None:
    rows = datasets.Dataset.from_list([{"row": row} for row in range(2)])
    with pytest.raises(UserError, match="--forgetting_budget"):
        limit_forgetting(
            SimpleNamespace(set_=lambda alpha: None), rows=rows, loss=lambda text: LossResult(0.0, 0), budget=0.1
        )


def test_validation_rows_choose_among_the_scales_that_fit() -> None:
    """General loss 2 + alpha, a validation loss that is least at 0.5: it wins although 0.75 fits too."""
    general, held_out = (datasets.Dataset.from_list([{"row": row} for row in range(size)]) for size in (4, 3))
    alphas: list[float] = []

    def loss(text: datasets.Dataset) -> LossResult:
        return LossResult((alphas[-1] - 0.5) ** 2 if len(text) == 3 else 2 + alphas[-1], 1)

    found = limit_forgetting(
        SimpleNamespace(set_=alphas.append), rows=general, loss=loss, budget=0.8, validated=held_out
    )
    assert found["delta_scale"] == alphas[-1] == 0.5
    assert found["report"]["after"] == 2.5
    assert {trial["score"] for trial in found["curve"]["trials"]} >= {-0.25, -0.0625, 0.0}


def test_a_task_without_a_mask_is_scaled_in_every_trained_weight_and_back_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = nn.Linear(4, 3).to(dtype)
        names = ["weight"]
        before, bias = model.weight.detach().clone(), model.bias.detach().clone()
        change = DenseChange(model, names)
        with torch.no_grad():
            model.weight.add_(torch.randn(3, 4).to(dtype))
        after = model.weight.detach().clone()
        change.end()
        for alpha in (0.25, 0.0, 0.5, 1.0):
            change.set_(alpha)
            want = (before.double() + alpha * (after.double() - before.double())).to(dtype)
            assert torch.equal(model.weight, after if alpha == 1 else before if alpha == 0 else want)
            assert torch.equal(model.bias, bias)


def test_scaling_a_task_drops_zero_3s_second_copy_of_what_it_has_changed() -> None:
    """Hierarchical partitioning gathers from that copy, and would train and judge the weights of before."""
    model, task = trained()
    dense = DenseChange(model, ["weight"])
    dense.end()
    masked = masked_change(SimpleNamespace(module=model), task.mask, task.previous, read_selected(model, task.mask))
    param: Any = model.weight
    for change in (dense, masked):
        for alpha in (0.5, 1.0):
            param.ds_secondary_tensor = torch.zeros(12)
            change.set_(alpha)
            assert param.ds_secondary_tensor is None


def test_weights_that_the_engine_rounds_after_the_copy_are_scaled_in_its_dtype() -> None:
    """PEFT makes adapters in fp32 beside a bf16 model, and the engine rounds all of it once."""
    for dtype in (torch.bfloat16, torch.float16):
        model = nn.Linear(4, 3)
        change = DenseChange(model, ["weight"])
        model.to(dtype)
        rounded = model.weight.detach().clone()
        with torch.no_grad():
            model.weight.add_(1.0)
        after = model.weight.detach().clone()
        change.end()
        for alpha, want in ((0.0, rounded), (1.0, after), (0.5, None)):
            change.set_(alpha)
            assert model.weight.dtype == dtype
            half = (rounded.double() + 0.5 * (after.double() - rounded.double())).to(dtype)
            assert torch.equal(model.weight, half if want is None else want)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_was_copied_whole_is_divided_as_zero_3_divides_a_parameter(
    monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    """Adapters are copied before ZeRO-3 partitions them: of seven elements, the last rank's part is padded."""
    whole, chunk = torch.arange(1.0, 8.0), -(-7 // num_ranks)
    parts = []
    for rank in range(num_ranks):
        monkeypatch.setattr("torch.distributed.get_rank", lambda group=None, rank=rank: rank)
        param: Any = SimpleNamespace(ds_tensor=torch.empty(chunk), ds_process_group=None)
        parts.append(_shard(whole, param))
    assert all(part.numel() == chunk for part in parts)
    assert torch.equal(torch.cat(parts), torch.cat([whole, torch.zeros(chunk * num_ranks - 7)]))


def test_alpha_times_loras_second_factor_is_alpha_times_its_change() -> None:
    model = make_model("llama")
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight").detach().clone()
    method = METHODS["lora"].baseline(BaselineArguments())
    adapted = method.adapt(model, 1, None)
    change = DenseChange(adapted, method.scaled_names(adapted))
    assert all(".lora_B." in name for name in method.scaled_names(adapted))
    with torch.no_grad():
        for param in adapted.parameters():
            if param.requires_grad:
                param.add_(torch.randn(param.shape))
    change.end()
    name = "model.layers.0.self_attn.q_proj.weight"
    whole = merged(adapted, adapted.state_dict())[name] - weight
    change.set_(0.25)
    torch.testing.assert_close(merged(adapted, adapted.state_dict())[name] - weight, 0.25 * whole, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_scaled_is_refused() -> None:
    text = ["--forgetting_budget", "0.1", "--general_text", "builtin"]
    for flags, num_tasks, message in (
        (["--method", "lora"], 2, "a later task of --method lora"),
        (["--method", "lora"], 1, None),
        (["--method", "o-lora"], 2, None),
        (["--method", "seqft"], 3, None),
        (["--method", "peft", "--peft_config", "f"], 1, "a task of --method peft"),
    ):
        with pytest.raises(UserError, match=message) if message else nullcontext():
            check_general_flags(parse([*flags, *text]), num_tasks)
