"""The statistics pass on two ranks and one engine: every micro-batch once, also if the pass was broken off."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from support.engines import Setup, adamw, make_engine
from support.models import make_model
from support.ranks import on_ranks
from support.statistics_cases import Case, oracle_of
from torch import Tensor

from piece_ds.data.collate import MicroBatches
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.batch_feed import rounds_of
from piece_ds.zero.statistics import collect_statistics

# Seven micro-batches, so that one rank repeats one; two of them give NaN.
CASE = Case("branches", Setup(2), poison=True)


class Keeper:
    """Keeps the sums of four micro-batches, and begins a later pass from them."""

    def __init__(self) -> None:
        self.kept: GradientStats | None = None
        self.num_kept: list[int] = []

    def begin(self, stats: GradientStats) -> None:
        if self.kept is not None:
            stats.square_sum.copy_(self.kept.square_sum)
            stats.grad_sum.copy_(self.kept.grad_sum)
            stats.num_micro_batches, stats.num_nonfinite = self.kept.num_micro_batches, self.kept.num_nonfinite

    def is_due(self, num_done: int) -> bool:
        return num_done == 4 or num_done >= 7

    def keep(self, stats: GradientStats) -> None:
        self.num_kept.append(stats.num_micro_batches)
        if self.kept is None:
            self.kept = replace(stats, square_sum=stats.square_sum.clone(), grad_sum=stats.grad_sum.clone())


def of_parameters(stats: GradientStats, values: Tensor) -> dict[str, tuple[int, np.ndarray]]:
    """Parameter -> (first element, values) of this rank."""
    return {i.name: (part.start, values[o : o + part.numel].numpy()) for i, part, o in stats.layout.owned()}


def test_a_pass_that_goes_on_gives_the_bits_of_one_that_was_not_broken_off_and_counts_all_once() -> None:
    def work() -> Any:
        rank = str(torch.distributed.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        model = make_model(CASE.family)
        engine = make_engine(model, CASE.setup, adamw(model), accumulation=3)  # which divides no gradient here
        keeper = Keeper()
        whole, resumed = (collect_statistics(engine, CASE.batches(), keeper=keeper) for _ in range(2))
        for one, other in ((whole.square_sum, resumed.square_sum), (whole.grad_sum, resumed.grad_sum)):
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))
        assert whole.num_micro_batches == resumed.num_micro_batches == 7
        assert whole.num_nonfinite == resumed.num_nonfinite > keeper.kept.num_nonfinite > 0
        assert keeper.num_kept == [4, 7, 7]
        return [of_parameters(whole, values) for values in (whole.grad_sum, whole.square_sum)]

    found = on_ranks(2, work)
    for which, expected in enumerate(oracle_of(CASE)[:2]):
        for name, values in expected.items():
            for start, own in (ranks[which][name] for ranks in found):
                want = values[start : start + own.size]
                assert np.allclose(own, want, rtol=1e-4, atol=1e-5 * np.abs(values).max(initial=0)), name


def test_a_shorter_micro_batch_has_a_round_of_its_own_under_a_loss_that_may_gather_rows() -> None:
    """A trainer's loss may gather figures of rows, so all ranks of a round need as many rows."""

    def rounds(num_rows: int, num_ranks: int, begin: int = 0, has_loss: bool = True) -> list[list[int]]:
        own = (lambda engine, batch: engine(batch)) if has_loss else None
        return [list(r) for r in rounds_of(MicroBatches(range(num_rows), list, 2, own), begin, num_ranks)]

    assert rounds(8, 2) == [[0, 1], [2, 3]]
    assert rounds(7, 2) == [[0, 1], [2], [3]]
    assert rounds(7, 2, has_loss=False) == [[0, 1], [2, 3]]
    assert rounds(7, 2, begin=2) == [[2], [3]]
    assert rounds(7, 2, begin=3) == [[3]]
    assert rounds(9, 2) == [[0, 1], [2, 3], [4]]
    assert rounds(9, 3) == [[0, 1, 2], [3], [4]]
    assert rounds(1, 4) == [[0]]
    assert rounds(7, 2, begin=4) == []
    assert [list(r) for r in rounds_of([{}] * 3, 0, 2)] == [[0, 1], [2]]
