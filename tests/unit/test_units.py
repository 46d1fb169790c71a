"""Rows and columns: exact sums, the same units as numpy takes, in one process and on several ranks."""

import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from support.models import make_model
from support.oracle import Arrays, score
from support.ranks import on_ranks
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from piece_ds.config.piece import PieceConfig
from piece_ds.config.settings import parse
from piece_ds.methods.estimate import count_selected, estimate_mask, select
from piece_ds.methods.piece_variants import ratio_score
from piece_ds.methods.registry import METHODS
from piece_ds.methods.request import SelectionRequest
from piece_ds.models.layout import layout_of
from piece_ds.preflight.checks import check_sources
from piece_ds.runtime.errors import UserError
from piece_ds.selection.exact_sums import add_, empty_sums, means
from piece_ds.state.statistics import GradientStats

pytestmark = pytest.mark.heavy


class Mixed(nn.Module):
    """Matrices stored both ways, vectors, a scalar and a tensor of three dimensions; nothing is ever computed."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 11), Conv1D(5, 6), nn.Linear(13, 1), nn.Linear(1, 4)])
        self.experts = nn.Parameter(torch.zeros(2, 3, 4))
        self.scalar = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(9, 9), requires_grad=False)


STORED_IN_FIRST = {"layers.1.weight"}
KINDS = ("random", "tied", "equal", "zero", "wide", "infinite")
BUDGETS = ("model", "layer", "tensor")
RATIOS = (0.02, 0.2, 0.45, 1.0)
UNITS = ("row", "column")
CASES = list(product(KINDS, ("piece-f", "piece-s"), UNITS, BUDGETS, RATIOS))


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in Mixed().named_parameters() if p.requires_grad}


def whole_sums(kind: str) -> tuple[Arrays, Arrays]:
    """(G, F), fp32, flat, of every eligible parameter."""
    rng = np.random.default_rng(5)
    sums, squares = {}, {}
    for name, shape in shapes().items():
        n = math.prod(shape)
        f = rng.random(n)
        f = {"tied": np.round(3 * f), "equal": f * 0 + 0.3, "zero": f * 0, "wide": 10.0 ** rng.uniform(-44, 38, n)}.get(
            kind, f
        )
        squares[name] = f.astype(np.float32)
        if kind == "infinite":
            squares[name][::17] = np.inf
        sums[name] = (rng.choice([-1, 1], n) * np.sqrt(squares[name])).astype(np.float32)
    return sums, squares


def own_share(whole: Arrays) -> Tensor:
    layout = layout_of(Mixed())
    return torch.from_numpy(np.concatenate([whole[i.name][p.start : p.stop] for i, p, _ in layout.owned()]))


def entries(scores: Arrays, unit: str) -> Iterator[tuple[str, float, list[int]]]:
    """(parameter, mean score, flat positions) of everything that competes, by the contract's words."""
    for name, shape in shapes().items():
        flat = np.arange(math.prod(shape)).reshape(shape)
        if len(shape) == 2:
            out_in = flat.T if name in STORED_IN_FIRST else flat
            groups = out_in.tolist() if unit == "row" else out_in.T.tolist()
        else:
            groups = [[i] for i in flat.reshape(-1).tolist()]
        for group in groups:
            values = [float(x) for x in scores[name][group]]
            yield name, math.inf if math.inf in values else math.fsum(values) / len(group), group


def expected(scores: Arrays, unit: str, budget: str, ratio: float) -> set[tuple[str, int]]:
    """The selection, by definition: units in order of score, ties to the smaller, until one exceeds its k."""
    sizes = {name: math.prod(shape) for name, shape in shapes().items()}
    total = sum(p.numel() for p in Mixed().parameters())
    k = min(max(1, int(ratio * total)), sum(sizes.values()))
    key = {name: {"model": "", "tensor": name, "layer": name[:8]}[budget] for name in sizes}
    key = {name: "other" if budget == "layer" and not name.startswith("layers.") else k for name, k in key.items()}
    weight: dict[str, int] = {}
    for name, size in sizes.items():
        weight[key[name]] = weight.get(key[name], 0) + size
    left = {group: k * w // sum(weight.values()) for group, w in weight.items()}
    rest = sorted(weight, key=lambda group: -(k * weight[group] % sum(weight.values())))
    for group in rest[: k - sum(left.values())]:
        left[group] += 1
    found = set()
    full: set[str] = set()
    for name, _, group in sorted(entries(scores, unit), key=lambda entry: -entry[1]):
        if key[name] in full or len(group) > left[key[name]]:
            full.add(key[name])
            continue
        left[key[name]] -= len(group)
        found |= {(name, i) for i in group}
    return found


def scores_of(kind: str, method: str) -> Arrays:
    with np.errstate(all="ignore"):
        return {name: np.nan_to_num(s, nan=0.0, posinf=np.inf) for name, s in score(method, *whole_sums(kind)).items()}


def selected(kind: str, method: str, unit: str, budget: str, ratio: float) -> set[tuple[str, int]] | None:
    """What select() takes over all ranks; None where it refuses since nothing fits. Checks what a mask promises."""
    sums, squares = whole_sums(kind)
    layout = layout_of(Mixed())
    stats = GradientStats(layout, own_share(squares), own_share(sums))
    try:
        mask = select(layout, method, ratio, stats, unit=unit, budget=budget)
    except UserError:
        return None
    for info, part, _ in layout.owned():
        index = mask.index.get(info.name)
        if index is not None:
            assert index.dtype == torch.int64
            assert bool((index.diff() > 0).all())
            assert part.start <= int(index[0])
            assert int(index[-1]) < part.stop
    found = {(name, i) for name, index in mask.whole().items() for i in index.tolist()}
    assert mask.num_selected == len(found)
    return found


def test_one_process_takes_the_units_that_numpy_takes() -> None:
    num_empty = 0
    for case in CASES:
        kind, method, unit, budget, ratio = case
        want = expected(scores_of(kind, method), unit, budget, ratio)
        assert (selected(*case) or set()) == want, case
        num_empty += not want
    assert 0 < num_empty < len(CASES) / 4


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_take_the_same(num_ranks: int) -> None:
    cases = CASES[num_ranks::7]  # 7 has no factor in common with the cases' periods

    def work() -> list[set[tuple[str, int]] | None]:
        return [selected(*case) for case in cases]

    want = [selected(*case) for case in cases]
    for found in on_ranks(num_ranks, work):
        assert found == want


def test_a_group_is_full_at_the_first_unit_that_does_not_fit() -> None:
    """Column 0 (4 elements) fits, column 1 does not any more; the bias after it would, and is not taken."""
    layer = nn.Linear(2, 4)
    layout = layout_of(layer)
    squares = torch.tensor([9.0, 5.0] * 4 + [1.0] * 4)
    mask = select(layout, "piece-f", 7.5 / 12, GradientStats(layout, squares, None), unit="column")
    assert {name: index.tolist() for name, index in mask.index.items()} == {"weight": [0, 2, 4, 6]}
    with pytest.raises(UserError, match=r"'column'.*of 'weight', has 4 elements, and only 3 .*--mask_ratio"):
        select(layout, "piece-f", 3.5 / 12, GradientStats(layout, squares, None), unit="column")


def test_estimators_of_weights_compete_by_unit_too() -> None:
    for method, unit in product(("magnitude", "random"), UNITS):
        weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(3))
        layout = layout_of(nn.Linear(10, 6, bias=False))
        mask = select(
            layout, method, 0.5, weight_of=lambda _, start, n, w=weight: w.view(-1)[start : start + n], unit=unit
        )
        grid = torch.zeros(60)
        grid[mask.index["weight"]] = 1
        lines = grid.view(6, 10).mean(1 if unit == "row" else 0)
        assert set(lines.tolist()) == {0.0, 1.0}
        assert mask.num_selected == 30
        if method == "magnitude":
            mean = weight.double().abs().mean(1 if unit == "row" else 0)
            assert set(lines.nonzero().view(-1).tolist()) == set(mean.topk(30 // (60 // len(mean))).indices.tolist())


def test_piece_ratio_competes_by_unit() -> None:
    """Its scores are made by itself; what is selected among them is not."""
    layout = layout_of(Mixed())
    f, g = (own_share(whole_sums(kind)[1]) for kind in ("random", "tied"))
    score_N = ratio_score(f, g, 0.5)
    config = PieceConfig(method="piece-ratio", ratio=0.3, unit="column")
    engine = type("Engine", (), {"module": Mixed(), "device": torch.device("cpu")})()
    request = SelectionRequest(engine, [], layout, config)
    mask = request.select(score_N, {info.name for info in layout.eligible()}, "model")
    parts = {info.name: score_N[o : o + part.numel].numpy() for info, part, o in layout.owned()}
    found = {(name, i) for name, index in mask.whole().items() for i in index.tolist()}
    assert found == expected(parts, "column", "model", 0.3)
    assert METHODS["piece-ratio"].has_units


def test_units_are_refused_where_a_method_has_a_rule_of_its_own() -> None:
    engine = type("Engine", (), {"module": make_model("llama"), "device": torch.device("cpu")})()
    refused = [m.name for m in METHODS.values() if m.has_mask and not m.has_units]
    assert {"shira", "migu", "layernorm", "hft", "lift", "piece-s-disjoint"} <= set(refused)
    for name in refused:
        with pytest.raises(UserError, match=f"'column' has no meaning with method '{name}'"):
            estimate_mask(engine, [], method=name, unit="column")
    with pytest.raises(UserError, match=r"unit 'colum' is unknown.*Did you mean 'column'"):
        PieceConfig(unit="colum")


def test_the_flag_is_refused_where_it_would_be_ignored() -> None:
    for method in [name for name, method in METHODS.items() if not method.has_units]:
        text = ["--general_text", "self"] if METHODS[method].needs_general_text else []
        with pytest.raises(UserError, match=rf"--unit row has no meaning with --method {method}, .*"):
            check_sources(parse(["--method", method, "--unit", "row", *text]), 2)
    with pytest.raises(UserError, match="--unit row has no meaning with --mask_file"):
        check_sources(parse(["--unit", "row", "--mask_file", "m.safetensors"]), 1)
    check_sources(parse(["--method", "piece-ratio", "--unit", "column", "--general_text", "self"]), 1)


def test_no_more_than_were_announced() -> None:
    model = Mixed()
    for unit in UNITS:
        room = count_selected(PieceConfig(method="piece-f", ratio=0.2, unit=unit), model)
        found = selected("random", "piece-f", unit, "model", 0.2)
        assert found is not None
        assert 0 < len(found) <= room


def test_sums_have_the_bits_of_the_exact_sum_in_any_order() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (10.0 ** rng.uniform(-45, 38, 500)).astype(np.float32),
        np.full(500, 3.4e38, np.float32),
        np.full(500, 1e-45, np.float32),
        np.concatenate([np.full(499, 1e-30), [3e38]]).astype(np.float32),
        np.zeros(500, np.float32),
        rng.random(500).astype(np.float32),
        np.where(np.arange(500) == 77, np.inf, 1.0).astype(np.float32),
    ]
    want = [math.inf if np.isinf(row).any() else math.fsum(row.tolist()) / 500 for row in rows]
    flat, which = torch.from_numpy(np.concatenate(rows)), torch.arange(len(rows)).repeat_interleave(500)
    for seed in range(3):
        order = torch.randperm(flat.numel(), generator=torch.Generator().manual_seed(seed))
        parts = [empty_sums(len(rows), "cpu") for _ in range(3)]
        for part, chunk in zip(parts, order.chunk(3), strict=True):
            add_(part, flat[chunk], which[chunk])
        assert means(parts[0] + parts[1] + parts[2], 500).tolist() == want


def test_a_ratio_of_one_takes_everything() -> None:
    everything = {(name, i) for name, shape in shapes().items() for i in range(math.prod(shape))}
    for unit in UNITS:
        assert selected("random", "piece-s", unit, "model", 1.0) == everything
