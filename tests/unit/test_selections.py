"""What defines each selection: LIFT's ranks, HFT's half, SHiRA's positions, MIGU's outputs, piece-ratio's division."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.shira.mask_functions import random_mask
from support.models import make_micro_batches, make_model
from torch import Tensor, nn

from piece_ds.config.piece import PieceConfig
from piece_ds.methods import piece_variants
from piece_ds.methods.activations import reversed_order
from piece_ds.methods.estimate import count_selected
from piece_ds.methods.hft import half_names
from piece_ds.methods.lift import low_rank
from piece_ds.methods.linear import linear_weights
from piece_ds.methods.migu import output_magnitudes
from piece_ds.methods.piece_variants import exclude_earlier, ratio_score
from piece_ds.methods.registry import METHODS
from piece_ds.methods.request import SelectionOptions, SelectionRequest
from piece_ds.models.layout import layout_of
from piece_ds.models.loading import freeze_ineligible
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import num_to_select, share_out
from piece_ds.selection.estimators import Fragment, zeroing
from piece_ds.selection.quantile import quantile_of_importance
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats, empty_stats

ALONE = ("lift", "lift-complement", "hft", "layernorm", "migu", "shira")  # no DeepSpeed needed
FAMILIES = ("llama", "qwen3", "neox", "gpt2")


class Engine(nn.Module):
    """What these selections see of an engine: the model, its device, a call."""

    device = torch.device("cpu")

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Tensor) -> object:
        return self.module(**batch)


def request_of(family: str, method: str, ratio: float = 0.02, **settings: object) -> SelectionRequest:
    model = make_model(family)
    freeze_ineligible(model)
    config = PieceConfig(method=method, ratio=ratio, **settings)
    return SelectionRequest(Engine(model), make_micro_batches(), layout_of(model), config)


@pytest.mark.parametrize("method", ALONE)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_are_selected_as_were_announced(family: str, method: str) -> None:
    """Compact mode makes room for them before anything is scored."""
    request = request_of(family, method)
    mask = METHODS[method].select(request)
    found = sum(positions.numel() for positions in mask.index.values())
    assert found == mask.num_selected == count_selected(request.config, request.model)
    if not METHODS[method].ignores_ratio:
        assert found == num_to_select(request.ratio, request.layout.total)
    assert mask.method == method
    assert mask.layout is request.layout


def test_hft_announces_as_many_as_it_draws_for_each_task() -> None:
    counts = set()
    for task in ("law", "medicine", "physics", "history"):
        request = request_of("llama", "hft")
        request = replace(request, options=replace(request.options, task=task))
        mask = METHODS["hft"].select(request)
        assert mask.num_selected == count_selected(request.config, request.model, task)
        counts.add(mask.num_selected)
    assert len(counts) > 1, "else the task would not matter"


@pytest.mark.parametrize("method", ALONE)
def test_positions_are_ascending_and_of_eligible_parameters(method: str) -> None:
    request = request_of("llama", method)
    eligible = {info.name: info.numel for info in request.layout.eligible()}
    for name, positions in METHODS[method].select(request).index.items():
        assert torch.equal(positions, positions.unique())
        assert 0 <= int(positions[0]) <= int(positions[-1]) < eligible[name]


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_low_rank_equals_a_truncated_svd(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    want = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose(low_rank(matrix, rank).numpy(), want, atol=2e-6)


def test_lift_takes_the_largest_of_each_matrix_after_rank_reduction() -> None:
    request = request_of("llama", "lift", lift_rank=2)
    mask = METHODS["lift"].select(request)
    params = dict(request.model.named_parameters())
    names = [weight.name for weight in linear_weights(request.model)]
    shares = share_out(mask.num_selected, [params[name].numel() for name in names])
    for name, share in zip(names, shares, strict=True):
        u, s, v = np.linalg.svd(params[name].detach().double().numpy(), full_matrices=False)
        score = np.abs((u[:, :2] * s[:2]) @ v[:2]).ravel()
        assert set(mask.index[name].tolist()) == set(np.argsort(-score)[:share].tolist())


def test_linear_weights_are_the_blocks_matrices_without_the_head() -> None:
    assert not any("head" in w.name or "embed" in w.name for f in FAMILIES for w in linear_weights(make_model(f)))
    assert len(linear_weights(make_model("llama"))) == 2 * 7
    assert [w.out_first for w in linear_weights(make_model("gpt2"))] == [False] * 8


@pytest.mark.parametrize("family", FAMILIES)
def test_hft_trains_half_of_each_category_of_each_block(family: str) -> None:
    request = request_of(family, "hft")
    names = half_names(request.model, request.layout, seed=3, task="law")
    feed_forward = []
    for block in (0, 1):
        inside = sorted({n.rpartition(".")[0] for n in request.layout.shapes() if re.search(rf"\.{block}\.", n)})
        chosen = {n.rpartition(".")[0] for n in names}
        norms = [u for u in inside if "norm" in type(request.model.get_submodule(u)).__name__.lower()]
        attention = [u for u in inside if "att" in u and u not in norms]
        rest = [u for u in inside if u not in norms and u not in attention]
        assert len(chosen & set(attention)) * 2 == len(attention)
        assert len(chosen & set(norms)) * 2 == len(norms)
        feed_forward.append((len(chosen & set(rest)), len(rest)))
    taken, there = (sum(column) for column in zip(*feed_forward, strict=True))
    assert 2 * taken == there  # of three matrices, two in one block and one in the next
    assert {n for n in names if not re.search(r"\.\d+\.", n)} == {
        info.name for info in request.layout.eligible() if not re.search(r"\.\d+\.", info.name)
    }


def test_hft_draws_anew_for_each_task_and_the_same_for_the_same() -> None:
    request = request_of("llama", "hft")
    law, medicine = (half_names(request.model, request.layout, 3, task) for task in ("law", "medicine"))
    assert law == half_names(request.model, request.layout, 3, "law")
    assert law != medicine
    assert law != half_names(request.model, request.layout, 4, "law")


def test_layernorm_selects_every_norm_whole_and_nothing_else() -> None:
    for family, num_norms in (("llama", 5), ("qwen3", 9), ("neox", 10)):
        request = request_of(family, "layernorm")
        index = METHODS["layernorm"].select(request).index
        assert len(index) == num_norms
        assert all("norm" in name for name in index)
        assert all(
            positions.numel() == dict(request.model.named_parameters())[n].numel() for n, positions in index.items()
        )


def test_a_model_without_norms_is_refused() -> None:
    model = make_model("branches")
    request = SelectionRequest(Engine(model), [], layout_of(model), PieceConfig(method="layernorm", ratio=0.1))
    with pytest.raises(UserError, match="no parameter to select"):
        METHODS["layernorm"].select(request)


def test_shira_selects_the_positions_of_pefts_random_mask() -> None:
    """With a budget of exactly 2 (rows + columns) per matrix."""
    model = make_model("llama")
    weights = linear_weights(model)
    k = sum(2 * sum(w.module.weight.shape) for w in weights)
    request = request_of("llama", "shira", (k + 0.5) / layout_of(model).total)
    index = METHODS["shira"].select(request).index
    for weight in weights:
        want = random_mask(weight.module, r=2, random_seed=request.config.seed).view(-1).nonzero().view(-1)
        assert torch.equal(index[weight.name], want)


def test_shira_refuses_a_share_that_a_matrix_cannot_hold() -> None:
    with pytest.raises(UserError, match="lower --mask_ratio"):
        METHODS["shira"].select(request_of("llama", "shira", 0.9))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_migus_magnitudes_are_mean_shares_of_the_l1_norm(family: str) -> None:
    """Against a forward pass with hooks of its own, row by row, padding left out."""
    request = request_of(family, "migu")
    weights = linear_weights(request.model)
    found = output_magnitudes(request.engine, request.micro_batches, weights)
    model = request.model.eval()
    outputs: dict[str, Tensor] = {}
    for w in weights:
        w.module.register_forward_hook(lambda _, args, out, name=w.name: outputs.__setitem__(name, out.double()))
    want = {w.name: 0.0 for w in weights}
    for batch in request.micro_batches:
        with torch.no_grad():
            model(**batch)
        tokens = batch["attention_mask"].bool()
        for name, out in outputs.items():
            shares = [
                token.abs() / token.abs().sum() for row, keep in zip(out, tokens, strict=True) for token in row[keep]
            ]
            want[name] = want[name] + torch.stack(shares).mean(0)
    for name, values in found.items():
        torch.testing.assert_close(values, want[name], rtol=1e-6, atol=1e-9)


def test_migu_reads_what_a_trainers_own_loss_is_differentiated_by() -> None:
    """Its micro-batches may be prompts in a list; the model may see other rows in between, without gradients."""
    request = request_of("llama", "migu")
    plain = request.micro_batches

    class OwnLoss(list[Any]):
        def loss_of(self, engine: Any, batch: Any) -> Tensor:
            (number,) = batch
            with torch.no_grad():
                engine(**plain[0])
            return engine(**plain[number]).loss

    weights = linear_weights(request.model)
    own = output_magnitudes(request.engine, OwnLoss([number] for number in range(len(plain))), weights)
    for name, values in output_magnitudes(request.engine, plain, weights).items():
        assert torch.equal(own[name], values)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_migu_selects_the_weights_of_the_largest_outputs(family: str) -> None:
    request = request_of(family, "migu", 0.1)
    index = METHODS["migu"].select(request).index
    magnitudes = output_magnitudes(request.engine, request.micro_batches, linear_weights(request.model))
    for weight in linear_weights(request.model):
        columns = weight.module.weight.shape[1]
        outputs = index[weight.name] // columns if weight.out_first else index[weight.name] % columns
        chosen = magnitudes[weight.name][outputs.unique()]
        others = magnitudes[weight.name][
            [i for i in range(len(magnitudes[weight.name])) if i not in set(outputs.tolist())]
        ]
        assert float(chosen.min()) >= float(others.max())


def layout_and_stats() -> tuple[SelectionRequest, GradientStats]:
    request = request_of("llama", "piece-s-disjoint", 0.3)
    generator = torch.Generator().manual_seed(2)
    sums = torch.randn(2, request.layout.num_owned, generator=generator)
    return request, GradientStats(request.layout, sums[0].square(), sums[1], 1)


@pytest.mark.parametrize("num_zeros", [0, 1, 2])
def test_median_counts_every_value_unless_it_would_be_zero(num_zeros: int) -> None:
    request, stats = layout_and_stats()
    values = stats.square_sum.clone()
    for offset in range(num_zeros):
        values[offset::3] = 0.0
    counted = values if num_zeros < 2 else values[values > 0]
    assert quantile_of_importance(values, request.layout) == counted.median().item()
    with pytest.raises(UserError, match="gives no gradient"):
        quantile_of_importance(torch.zeros_like(values), request.layout)


def test_a_quantile_is_an_order_statistic() -> None:
    request, stats = layout_and_stats()
    values = stats.square_sum
    for quantile in (0.0, 0.1, 0.5, 0.9, 1.0):
        want = np.quantile(values.numpy(), quantile, method="lower")
        assert quantile_of_importance(values, request.layout, quantile) == want, quantile


def test_ratio_prefers_what_the_task_needs_and_general_text_does_not() -> None:
    f, g = torch.tensor([1.0, 1.0, 0.5, 0.0]), torch.tensor([0.0, 9.0, 0.0, 0.0])
    torch.testing.assert_close(ratio_score(f, g, 1.0), torch.tensor([1.0, 0.1, 0.5, 0.0]))
    assert not ratio_score(torch.tensor([float("inf")]), torch.tensor([float("inf")]), 1.0).isnan().any()


def test_what_needs_general_text_is_refused_without() -> None:
    for method in ("piece-ratio", "piece-gain", "piece-ratio-activation", "ssu"):
        with pytest.raises(UserError, match=f"--method {method} needs text"):
            METHODS[method].select(request_of("llama", method))


def chosen_by(mask: Mask, score: dict[str, np.ndarray]) -> bool:
    """Whether a mask holds the highest of dense scores over all its tensors, none of which tie there."""
    flat = np.sort(np.concatenate([values.ravel() for values in score.values()]))
    least = flat[-mask.num_selected]
    return all(
        set(mask.index.get(name, torch.zeros(0)).tolist()) == set(np.flatnonzero(values.ravel() >= least).tolist())
        for name, values in score.items()
    )


def damping(cost: dict[str, np.ndarray], quantile: float) -> float:
    flat = np.concatenate([values.ravel() for values in cost.values()])
    return float(np.quantile(flat, quantile, method="lower"))


def dense_sums(model: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[dict[str, np.ndarray], ...]:
    """Sums of gradients and of their squares, by autograd alone, fp64."""
    params = {name: param for name, param in model.named_parameters() if param.requires_grad}
    sums: tuple[dict[str, np.ndarray], ...] = ({}, {})
    for batch in batches:
        for (name, _), g in zip(
            params.items(), torch.autograd.grad(model(**batch).loss, list(params.values())), strict=True
        ):
            for total, values in zip(sums, (g, g.square()), strict=True):
                total[name] = total.get(name, 0.0) + values.double().numpy()
    return sums


@pytest.fixture
def own_statistics(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Statistics without DeepSpeed, for a selection's own arithmetic; whether each pass was asked for its sum."""
    asked: list[bool] = []

    def collect(engine: Engine, batches: Any, needs_sum: bool, device: Any, layout: Layout) -> GradientStats:
        asked.append(needs_sum)
        stats = empty_stats(layout, needs_sum, "cpu")
        sums = dense_sums(engine.module, list(batches))
        for info, part, offset in layout.owned():
            for target, source in zip((stats.grad_sum, stats.square_sum), sums, strict=True):
                if target is not None:
                    flat = torch.from_numpy(source[info.name]).float().reshape(-1)
                    target[offset : offset + part.numel] = flat[part.start : part.stop]
        stats.num_micro_batches = len(batches)
        return stats

    for module in ("piece_variants", "activations"):
        monkeypatch.setattr(f"piece_ds.methods.{module}.collect_statistics", collect)
    return asked


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_gain_and_ratio_divide_the_task_by_damped_general_text(quantile: float, own_statistics: list[bool]) -> None:
    """Only the gain keeps the gradients' sum, 4 bytes for each weight."""
    task, text = make_micro_batches("qwen3", 6)[:3], make_micro_batches("qwen3", 6)[3:]
    for method in ("piece-gain", "piece-ratio"):
        request = replace(request_of("qwen3", method, damping_quantile=quantile), micro_batches=task)
        eligible = {info.name for info in request.layout.eligible()}
        general = piece_variants.collect_statistics(request.engine, text, False, None, request.layout)
        request = replace(request, options=SelectionOptions(general=lambda general=general: general))
        (total, squares), (_, h) = dense_sums(request.model, task), dense_sums(request.model, text)
        cost = {name: h[name] / len(text) for name in eligible}
        d = damping(cost, quantile)
        top = {name: (total[name] / 3) ** 2 if method == "piece-gain" else squares[name] / 3 for name in eligible}
        mask = METHODS[method].select(request)
        assert mask.method == method
        assert own_statistics[-1] == (method == "piece-gain")
        assert chosen_by(mask, {name: top[name] / (cost[name] + d) for name in eligible}), method


def moments_of(model: nn.Module, text: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Each layer's mean square of inputs over tokens, averaged over micro-batches; by hooks of its own."""
    found: dict[str, np.ndarray] = {}
    for weight in linear_weights(model):

        def watch(module: nn.Module, args: Any, name: str = weight.name) -> None:
            x = args[0].detach().double().reshape(-1, args[0].shape[-1])[kept]
            found[name] = found.get(name, 0.0) + x.square().mean(0).numpy() / len(text)

        weight.module.register_forward_pre_hook(watch)
    for batch in text:
        kept = batch["attention_mask"].reshape(-1).bool() if "attention_mask" in batch else slice(None)
        with torch.no_grad():
            model.eval()(**batch)
    return found


@pytest.mark.usefixtures("own_statistics")
@pytest.mark.parametrize(("family", "quantile"), [("llama", 0.5), ("gpt2", 0.5), ("llama", 0.9)])
def test_activations_stand_for_what_a_change_costs(family: str, quantile: float) -> None:
    task, text = make_micro_batches(family, 5)[:3], make_micro_batches(family, 5)[3:]
    request = replace(request_of(family, "piece-ratio-activation", damping_quantile=quantile), micro_batches=task)
    request = replace(request, options=SelectionOptions(general_batches=text))
    mask = METHODS["piece-ratio-activation"].select(request)
    squares = dense_sums(request.model, task)[1]
    moments, cost = moments_of(request.model, text), {}
    for weight in linear_weights(request.model):
        of_input = moments[weight.name][None, :] if weight.out_first else moments[weight.name][:, None]
        cost[weight.name] = np.broadcast_to(of_input, squares[weight.name].shape)
    d = damping(cost, quantile)
    assert chosen_by(mask, {name: squares[name] / 3 / (cost[name] + d) for name in cost})


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ssu_trains_the_columns_that_general_text_needs_least(family: str) -> None:
    text = make_micro_batches(family, 5)[3:]
    request = replace(request_of(family, "ssu", 0.1), options=SelectionOptions(general_batches=text))
    mask = METHODS["ssu"].select(request)
    moments = moments_of(request.model, text)
    for weight in linear_weights(request.model):
        matrix = dict(request.model.named_parameters())[weight.name].detach().numpy()
        matrix = matrix if weight.out_first else matrix.T
        importance = np.abs(matrix).mean(0) * np.sqrt(moments[weight.name])
        index = mask.index[weight.name].numpy()
        inputs = index % matrix.shape[1] if weight.out_first else index // matrix.shape[0]
        count = np.bincount(inputs, minlength=matrix.shape[1])[np.argsort(importance, kind="stable")]
        whole = int((count == matrix.shape[0]).sum())
        assert (count[:whole] == matrix.shape[0]).all(), weight.name
        assert (count[whole + 1 :] == 0).all(), weight.name  # at most one column in part


def test_lifts_complement_begins_where_lift_ends() -> None:
    request = request_of("llama", "lift-complement", 0.2, lift_rank=2)
    mask = METHODS["lift-complement"].select(request)
    params = dict(request.model.named_parameters())
    for name, index in mask.index.items():
        score = low_rank(params[name].detach(), 2).abs().reshape(-1)
        left = torch.ones(score.numel(), dtype=torch.bool)
        left[index] = False
        assert float(score[index].max()) <= float(score[left].min())


def test_the_order_of_any_values_is_reversed_to_the_bit() -> None:
    values = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 1.0, torch.finfo(torch.float32).max])
    turned = reversed_order(values)
    assert bool((turned >= 0).all())
    assert torch.equal(turned.argsort(stable=True), torch.tensor([5, 3, 4, 2, 1, 0]))
    assert turned[3] == turned[4]


def test_zeroing_gains_where_weight_and_gradient_agree() -> None:
    weight, total = torch.tensor([1.0, -2.0, 3.0, float("nan"), 0.0]), torch.tensor([2.0, 1.0, float("inf"), 1.0, 5.0])
    fragment = Fragment(0, 0, 5, torch.device("cpu"), total.square(), total, lambda: weight)
    assert zeroing(fragment).tolist() == [2.0, 0.0, float("inf"), 0.0, 0.0]


def test_disjoint_masks_share_nothing_and_end_where_no_weight_is_free() -> None:
    request, _ = layout_and_stats()
    earlier: list[dict[str, Tensor]] = []
    while len(earlier) < 3 and 0.3 * request.layout.total * (len(earlier) + 1) <= request.layout.num_eligible:
        stats = layout_and_stats()[1]
        mask = exclude_earlier(replace(request, options=SelectionOptions(earlier=earlier)), stats)
        for before in earlier:
            for name in mask.index.keys() & before.keys():
                assert not torch.isin(mask.index[name], before[name]).any()
        earlier.append(mask.index)
    assert len(earlier) >= 2
    with pytest.raises(UserError, match="not taken by an earlier task"):
        exclude_earlier(replace(request, options=SelectionOptions(earlier=earlier)), layout_and_stats()[1])


def test_first_disjoint_mask_is_piece_s() -> None:
    from piece_ds.methods.estimate import select

    request, stats = layout_and_stats()
    want = select(request.layout, "piece-s", 0.3, layout_and_stats()[1])
    found = exclude_earlier(request, stats)
    assert all(torch.equal(want.index[name], found.index[name]) for name in want.index)
