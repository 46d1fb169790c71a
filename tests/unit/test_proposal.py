"""The ratio that scores propose: where the highest hold half of all, from a histogram."""

import numpy as np
import pytest
import torch
from support.models import make_model
from support.ranks import on_ranks

from piece_ds.models.layout import layout_of
from piece_ds.selection.proposal import num_holding, proposed_ratio
from piece_ds.state.mask import Mask
from piece_ds.training.progress import proposal


def counts_of(scores: np.ndarray) -> torch.Tensor:
    keys = scores.astype(np.float32).view(np.int32) >> 20
    return torch.from_numpy(np.bincount(keys, minlength=2048)).long()


def fewest(scores: np.ndarray, share: float) -> int:
    held = np.sort(scores.astype(np.float64))[::-1].cumsum()
    return int(np.searchsorted(held, share * held[-1])) + 1


def test_as_many_are_proposed_as_hold_half_of_all() -> None:
    rng = np.random.default_rng(1)
    for scale in (0.1, 0.5, 1.0, 2.0, 3.0):
        scores = np.exp(rng.normal(size=200_000) * scale)
        for share in (0.25, 0.5, 0.9):
            want = fewest(scores, share)
            assert num_holding(counts_of(scores), share) == pytest.approx(want, rel=0.05, abs=2), (scale, share)


def test_the_heavier_the_tail_the_fewer_are_proposed() -> None:
    rng = np.random.default_rng(2)
    found = [num_holding(counts_of(np.exp(rng.normal(size=50_000) * scale)), 0.5) for scale in (0.5, 1.0, 2.0, 3.0)]
    assert found == sorted(found, reverse=True)


def test_scores_that_say_little_propose_what_they_can() -> None:
    assert num_holding(torch.zeros(2048, dtype=torch.int64), 0.5) == 0
    assert num_holding(counts_of(np.zeros(9)), 0.5) == 0
    assert num_holding(counts_of(np.array([0.0] * 90 + [1.0] * 10)), 0.5) == 5
    assert num_holding(counts_of(np.array([0.0] * 90 + [1.0] * 10)), 1.0) == 10
    assert num_holding(counts_of(np.array([np.inf] + [1.0] * 99)), 0.5) == 1
    assert num_holding(counts_of(np.array([1e-3] * 99 + [3e38])), 0.5) == 1


def test_any_number_of_ranks_proposes_the_same() -> None:
    whole = layout_of(make_model("llama"))
    scores = torch.randn(whole.num_owned, generator=torch.Generator().manual_seed(3)).mul(2).exp()
    offset_of = {info.name: offset for info, _, offset in whole.owned()}

    def propose() -> float:
        layout = layout_of(make_model("llama"))
        own = [scores[offset_of[info.name] + part.start :][: part.numel] for info, part, _ in layout.owned()]
        return proposed_ratio(torch.cat(own), layout)

    alone, *ranks = [*on_ranks(1, propose), *on_ranks(2, propose)]
    assert all(found == alone for found in ranks)
    assert alone == pytest.approx(fewest(scores.numpy(), 0.5) / whole.total, rel=0.05)


def test_the_log_says_what_is_proposed() -> None:
    layout = layout_of(make_model("llama"))
    assert proposal(Mask(layout, {}, 0)) == ""
    assert proposal(Mask(layout, {}, 0, proposed_ratio=0.0273)) == "; proposed ratio: 2.7 %"
