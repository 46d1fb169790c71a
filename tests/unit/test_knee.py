"""The ratio that scores propose: where a weight holds as much as the average one, from a histogram."""

import math

import numpy as np
import pytest
import torch
from support.models import make_model
from support.ranks import on_ranks

from piece_ds.models.layout import layout_of
from piece_ds.selection.estimators import PIECE_S
from piece_ds.selection.knee import knee, proposed_ratio, proposed_ratio_of
from piece_ds.state.mask import Mask
from piece_ds.state.statistics import GradientStats
from piece_ds.training.progress import proposal


def counts_of(scores: np.ndarray) -> torch.Tensor:
    keys = scores.astype(np.float32).view(np.int32) >> 20
    return torch.from_numpy(np.bincount(keys, minlength=2048)).long()


def test_the_knee_lies_where_scores_are_the_mean() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.5, 1.0, 2.0, 3.0):
        scores = np.exp(rng.normal(size=200_000) * scale)
        want = int((scores > scores.mean()).sum())
        # For a lognormal, the share above the mean is that of a normal above scale / 2.
        assert want / scores.size == pytest.approx(0.5 * math.erfc(scale / 2 / math.sqrt(2)), rel=0.05)
        assert knee(counts_of(scores)) == pytest.approx(want, rel=0.1), scale


def test_the_heavier_the_tail_the_fewer_are_proposed() -> None:
    rng = np.random.default_rng(2)
    found = [knee(counts_of(np.exp(rng.normal(size=50_000) * scale))) for scale in (0.5, 1.0, 2.0, 3.0, 4.0)]
    assert found == sorted(found, reverse=True)


def test_what_is_no_spread_proposes_what_is_there() -> None:
    assert knee(torch.zeros(2048, dtype=torch.int64)) == 0
    assert knee(counts_of(np.zeros(9))) == 0
    assert knee(counts_of(np.array([0.0] * 90 + [1.0] * 10))) == 10
    assert knee(counts_of(np.array([np.inf] + [1.0] * 99))) == 1
    assert knee(counts_of(np.array([1e-3] * 99 + [3e38]))) == 1


def test_any_number_of_ranks_proposes_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    total = layout_of(make_model("llama")).num_owned
    sums = torch.randn(2, total, generator=generator).mul(2).exp()

    def propose() -> tuple[float, float]:
        layout = layout_of(make_model("llama"))
        own = torch.cat(
            [
                sums[:, offset_of[info.name] :][:, part.start : part.start + part.numel]
                for info, part, _ in layout.owned()
            ],
            dim=1,
        )
        stats = GradientStats(layout, own[0].contiguous(), own[1].contiguous(), 1)
        return proposed_ratio(PIECE_S, layout, stats), proposed_ratio_of(own[0].contiguous(), layout)

    offset_of = {info.name: offset for info, _, offset in layout_of(make_model("llama")).owned()}
    alone, *ranks = [*on_ranks(1, propose), *on_ranks(2, propose)]
    assert all(found == alone for found in ranks)
    assert 0 < alone[0] < 0.5
    want = float((sums[0] > sums[0].mean()).sum()) / layout_of(make_model("llama")).total
    assert alone[1] == pytest.approx(want, rel=0.1)


def test_the_log_says_what_is_proposed() -> None:
    layout = layout_of(make_model("llama"))
    assert proposal(Mask(layout, {}, 0)) == ""
    assert proposal(Mask(layout, {}, 0, proposed_ratio=0.0273)) == "; proposed ratio: 2.7 %"
