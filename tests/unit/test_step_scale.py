"""Steps by general importance: factors are the oracle's, and SparseAdamW's steps are plain AdamW's times them."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import make_micro_batches, make_model
from support.oracle import SelectedAdamW, step_factors
from torch import Tensor, nn

from piece_ds.config.settings import parse
from piece_ds.methods.estimate import select
from piece_ds.methods.registry import METHODS
from piece_ds.models.layout import layout_of
from piece_ds.preflight.general_flags import check_general_flags
from piece_ds.runtime.errors import UserError
from piece_ds.state.statistics import GradientStats, empty_stats
from piece_ds.update.sparse_adamw import SparseAdamW
from piece_ds.update.step_scale import general_step_scale
from piece_ds.zero.scaled_update import scaled

LEARNING_RATE, WEIGHT_DECAY, NUM_GENERAL = 1e-2, 0.1, 3


def general_of(model: nn.Module) -> GradientStats:
    """Made-up statistics over five decades, with zeros."""
    stats = empty_stats(layout_of(model), False, "cpu")
    rng = np.random.default_rng(5)
    values = np.exp(rng.normal(size=stats.square_sum.numel()) * 2).astype(np.float32)
    values[rng.random(values.size) < 0.2] = 0.0
    stats.square_sum.copy_(torch.from_numpy(values))
    stats.num_micro_batches = NUM_GENERAL
    return stats


def oracle_factors(stats: GradientStats) -> dict[str, Tensor]:
    squares = {
        info.name: stats.square_sum[offset : offset + part.numel].double().numpy() / NUM_GENERAL
        for info, part, offset in stats.layout.owned()
    }
    return step_factors(squares)


def test_factors_are_the_oracles() -> None:
    model = make_model("llama")
    stats = general_of(model)
    before = stats.square_sum.clone()
    step_scale = general_step_scale(stats)
    want = torch.cat(list(oracle_factors(stats).values()))
    torch.testing.assert_close(step_scale.factor_N.double(), want, rtol=1e-6, atol=0)
    assert bool((step_scale.factor_N[stats.square_sum == 0] == 1).all())
    assert float(step_scale.factor_N.max()) <= 1.0
    assert torch.equal(stats.square_sum, before)


def test_an_infinite_importance_stops_a_weight_and_none_makes_nan() -> None:
    stats = general_of(make_model("llama"))
    stats.square_sum[:3] = float("inf")
    factor_N = general_step_scale(stats).factor_N
    assert factor_N[:3].tolist() == [0.0, 0.0, 0.0]
    assert bool(factor_N.isfinite().all())


def test_text_without_gradient_is_refused() -> None:
    stats = general_of(make_model("llama"))
    stats.square_sum.zero_()
    with pytest.raises(UserError, match="gives no gradient"):
        general_step_scale(stats)


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # no biases: a key's has only noise for a gradient
def test_sparse_adamw_takes_plain_steps_times_the_factors(family: str) -> None:
    model, oracle = make_model(family), make_model(family)
    stats = general_of(model)
    mask = select(layout_of(model), "random", 0.05)
    whole, start = mask.whole(), {name: param.detach().clone() for name, param in model.named_parameters()}
    step_scale = general_step_scale(stats)
    optimizer = SparseAdamW(model, mask, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, step_scale=step_scale)
    plain = SelectedAdamW(oracle, whole, LEARNING_RATE, lambda name: WEIGHT_DECAY, 1.0, oracle_factors(stats))
    for step in range(3):
        batch = make_micro_batches(family, 3)[step]
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([optimizer.values], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        plain.step([batch])
    largest = max(float((p.detach() - start[n]).abs().max()) for n, p in oracle.named_parameters())
    for (name, got), want in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * largest, msg=name)
        unselected = torch.ones(got.numel(), dtype=torch.bool)
        unselected[whole.get(name, torch.zeros(0).long())] = False
        assert torch.equal(got.detach().view(-1)[unselected], start[name].view(-1)[unselected])


def test_sparse_adamw_in_bf16_leaves_the_rounded_values_in_the_model_and_resumes_to_the_bit() -> None:
    batches = make_micro_batches("llama", 4)

    def optimizer_of(model: nn.Module) -> SparseAdamW:
        mask = select(layout_of(model), "random", 0.01)
        return SparseAdamW(model, mask, step_scale=general_step_scale(general_of(model)))

    def run(model: nn.Module, optimizer: SparseAdamW, part: slice) -> None:
        for batch in batches[part]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = make_model("llama").bfloat16()
    index = select(layout_of(straight), "random", 0.01).whole()
    optimizer = optimizer_of(straight)
    run(straight, optimizer, slice(0, 4))
    held = torch.cat([straight.get_parameter(name).detach().view(-1)[where] for name, where in index.items()])
    assert torch.equal(held, optimizer.values.detach().bfloat16())

    first = make_model("llama").bfloat16()
    half = optimizer_of(first)
    run(first, half, slice(0, 2))
    second = make_model("llama").bfloat16()
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second)
    resumed.load_state_dict(half.state_dict())
    run(second, resumed, slice(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


def test_a_factor_of_one_keeps_a_step_and_a_factor_of_zero_takes_it_back() -> None:
    before, after = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.25, -2.5, 3.5])
    assert torch.equal(scaled(before, after, torch.ones(3)), after)
    assert torch.equal(scaled(before, after, torch.zeros(3)), before)
    assert scaled(before, after, torch.tensor([0.5, 1.0, 0.0])).tolist() == [1.125, -2.5, 3.0]


def test_elements_without_general_statistics_keep_the_factor_one() -> None:
    """A mask from elsewhere may select what statistics leave out, such as embeddings."""
    model = make_model("llama")
    name = "model.embed_tokens.weight"
    mask = select(layout_of(model), "random", 0.01)
    mask = replace(mask, index={**mask.index, name: torch.tensor([0, 5])})
    factors = general_step_scale(general_of(model)).selected(mask)
    assert factors[name].tolist() == [1.0, 1.0]
    assert {key: values.numel() for key, values in factors.items()} == {k: v.numel() for k, v in mask.index.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layout: replace(layout, num_ranks=2), "made for 1 ranks, the mask for 2"),
        (lambda layout: replace(layout, parameters=layout.parameters[1:]), "of another model"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(change: Any, message: str) -> None:
    model = make_model("llama")
    mask = select(layout_of(model), "random", 0.01)
    with pytest.raises(UserError, match=message):
        general_step_scale(general_of(model)).selected(replace(mask, layout=change(mask.layout)))


def test_every_method_that_trains_the_models_own_weights_takes_scaled_steps() -> None:
    """Adapters begin with the task: general text has no importance for them."""
    refused = [name for name, method in METHODS.items() if method.baseline and method.baseline.saves_itself]
    assert sorted(refused) == ["lora", "o-lora", "peft"]
    for name in METHODS:
        extra = ["--peft_config", "f.json"] if name == "peft" else []
        settings = parse(["--method", name, "--step_scale", "general", "--general_text", "self", *extra])
        message = "--step_scale general has no meaning"
        with pytest.raises(UserError, match=message) if name in refused else nullcontext():
            check_general_flags(settings, 2)
