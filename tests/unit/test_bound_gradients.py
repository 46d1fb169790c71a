"""Gradients that are a list of tensors are masked as the flat buffer that they are, and values written as one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from torch import Tensor, nn

from piece_ds.zero.adapter import BoundGradients, Piece
from piece_ds.zero.weights import SelectedWeightList, SelectedWeights

PIECES = [Piece("a", 0, 5, 0), Piece("b", 2, 4, 5), Piece("c", 0, 3, 9)]  # of b, elements 2 to 5 are here
INDEX = {"a": torch.tensor([0, 4]), "b": torch.tensor([1, 2, 5]), "c": torch.tensor([2])}
WANTED = [0, 4, 5, 8, 11]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 4, (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_list_is_masked_as_its_concatenation(dtypes: tuple[torch.dtype, ...], side_by_side: bool) -> None:
    bound = BoundGradients()
    bound.bind(0, PIECES, INDEX)
    for _ in range(2):  # the second time positions are known
        parts = torch.arange(1.0, 15.0).split([5, 0, 4, 5])  # two elements of padding at the end
        grads = [
            part.to(dtype) if side_by_side else part.to(dtype, copy=True)
            for part, dtype in zip(parts, dtypes, strict=True)
        ]
        bound.mask_all_(0, grads)
        assert torch.cat([grad.float() for grad in grads]).nonzero().view(-1).tolist() == WANTED


def test_nothing_to_mask_is_nothing() -> None:
    bound = BoundGradients()
    bound.bind(0, [], {})
    bound.mask_all_(0, [])


def write_each_(weights: list[SelectedWeights], values: Tensor) -> None:
    for weight, part in zip(weights, values.split([weight.index.numel() for weight in weights]), strict=True):
        weight.write_(part.to(weight.param.dtype))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.float32, torch.bfloat16, torch.float32)])
def test_values_are_written_together_as_one_by_one(dtypes: tuple[torch.dtype, ...]) -> None:
    torch.manual_seed(0)
    start = [torch.randn(size).to(dtype) for size, dtype in zip((7, 4, 9), dtypes, strict=True)]
    index = [torch.tensor([1, 6]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 3, 8])]
    values = torch.randn(5).bfloat16()
    written = []
    for together in (False, True):
        params = [nn.Parameter(tensor.clone()) for tensor in start]
        weights = [SelectedWeights(param, where) for param, where in zip(params, index, strict=True)]
        whole = SelectedWeightList(weights)
        for scale in (1.0, 2.0):  # the second time places are known
            whole.write_(values * scale) if together else write_each_(weights, values * scale)
        written.append([param.detach() for param in params])
    for one_by_one, together, before in zip(*written, start, strict=True):
        assert torch.equal(one_by_one, together)
        assert not torch.equal(together, before) or together.numel() == 4


def test_each_rank_of_zero_3_writes_its_own_part_of_the_selected_values() -> None:
    """Seven elements in chunks of four: the second rank's first value is not the first of all."""

    def work() -> list[float]:
        rank = torch.distributed.get_rank()
        shard = torch.zeros(4)
        param: Any = SimpleNamespace(
            ds_id=0,
            ds_tensor=shard,
            ds_process_group=None,
            ds_status=SimpleNamespace(name="NOT_AVAILABLE"),
            ds_secondary_tensor=None,
            partition_numel=lambda: 4,
        )
        weights = SelectedWeights(param, torch.tensor([1, 3, 4, 6]))
        weights.write_(torch.tensor([10.0, 30.0, 40.0, 60.0]))
        assert weights.held_range() == ((0, 2), (2, 4))[rank]
        assert weights.read_held().tolist() == ([10.0, 30.0], [40.0, 60.0])[rank]
        return shard.tolist()

    assert on_ranks(2, work) == [[0.0, 10.0, 0.0, 30.0], [40.0, 0.0, 60.0, 0.0]]
