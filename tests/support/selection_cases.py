"""Statistics that make selection hard, and what must be selected, by a stable sort in numpy."""

from functools import cache
from itertools import product

import numpy as np
import torch
from torch import nn

from piece_ds.models.layout import layout_of
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats
from support.oracle import Arrays, score, top_k

KINDS = ("random", "all-equal", "all-zero", "bf16-tied", "infinite", "one-huge")
METHODS = ("piece-f", "piece-s")
BUDGETS = ("model", "layer", "tensor")
RATIOS = (1e-9, 0.01, 0.3, 1.0)  # k = 1, few, many, every eligible element
CASES = list(product(KINDS, METHODS, BUDGETS, RATIOS))


class Blocks(nn.Module):
    """An embedding, two blocks and a head, with parameters of awkward sizes; nothing is ever computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.layers = nn.ModuleList([nn.Linear(7, 11), nn.Linear(11, 1)])
        self.head = nn.Linear(1, 31)
        self.scalar = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(17), requires_grad=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


NOT_ELIGIBLE = ("embed.weight", "frozen")


@cache
def whole_sums(kind: str) -> tuple[Arrays, Arrays]:
    """(G, F) in fp32 of every eligible parameter, the same everywhere."""
    rng = np.random.default_rng(3)
    sums, squares = {}, {}
    for name, param in Blocks().named_parameters():
        if name in NOT_ELIGIBLE:
            continue
        g = rng.standard_normal(param.numel()).astype(np.float32)
        f = (g * g + rng.random(param.numel())).astype(np.float32)
        if kind == "all-equal":
            g, f = np.full_like(g, -0.5), np.full_like(f, 0.25)
        if kind == "all-zero":
            g, f = np.zeros_like(g), np.zeros_like(f)
        if kind == "bf16-tied":  # few distinct values: ties everywhere
            g, f = np.round(g), np.round(f)
        if kind == "infinite":
            g[::5], f[::3] = np.inf, np.inf
        if kind == "one-huge" and name == "layers.1.weight":
            g[4], f[4] = 3e38, 3e38
        sums[name], squares[name] = g, f
    return sums, squares


@cache
def expected(kind: str, method: str, budget: str, ratio: float) -> frozenset[tuple[str, int]]:
    """The selection, by definition. A score that is inf / inf counts as 0."""
    with np.errstate(invalid="ignore", over="ignore"):
        scores = {
            name: np.nan_to_num(s, nan=0.0, posinf=np.inf) for name, s in score(method, *whole_sums(kind)).items()
        }
    total = sum(p.numel() for p in Blocks().parameters())
    k = min(max(1, int(ratio * total)), sum(values.size for values in scores.values()))
    if budget == "model":
        return frozenset(top_k(scores, k))
    groups: dict[str, Arrays] = {}
    for name, values in scores.items():
        key = name if budget == "tensor" else name[:8] if name.startswith("layers.") else "other"
        groups.setdefault(key, {})[name] = values
    sizes = np.array([sum(v.size for v in group.values()) for group in groups.values()])
    shares = k * sizes / sizes.sum()  # largest remainder; the first of equal ones
    counts = np.floor(shares + 1e-9).astype(int)
    counts[np.argsort(-np.round(shares - counts, 9), kind="stable")[: k - counts.sum()]] += 1
    return frozenset().union(*(top_k(group, n) for group, n in zip(groups.values(), counts, strict=True) if n))


def make_stats(kind: str) -> GradientStats:
    """This rank's share of the statistics, cut by hand as chunks of ceil(n / W)."""
    layout = layout_of(Blocks())
    sums, squares = whole_sums(kind)

    def own(arrays: Arrays) -> torch.Tensor:
        chunks = {name: -(-values.size // layout.num_ranks) for name, values in arrays.items()}
        r = layout.rank
        return torch.from_numpy(np.concatenate([v[r * chunks[n] : (r + 1) * chunks[n]] for n, v in arrays.items()]))

    return GradientStats(layout, own(squares), own(sums))


def blocks_layout() -> Layout:
    return layout_of(Blocks())


def as_set(whole: dict[str, torch.Tensor]) -> set[tuple[str, int]]:
    """The selected (parameter, flat index) of Mask.whole()."""
    return {(name, i) for name, index in whole.items() for i in index.tolist()}
