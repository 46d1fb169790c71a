"""Ops on a list of tensors are the ops on their concatenation, for every provider of the CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.gpu_cases import FEW_SIZES, SIZES, cases, run_cases
from torch import Tensor

from piece_ds import ops

pytestmark = pytest.mark.usefixtures("cpu_provider")

LISTS = ("apply_mask_list_", "scatter_list_", "sparse_adamw_list_")


@pytest.mark.parametrize("sizes", [FEW_SIZES, pytest.param(SIZES, marks=pytest.mark.slow)], ids=["few", "every"])
def test_every_case_equals_the_reference(sizes: list[int], cpu_provider: str) -> None:
    """Side by side in memory or apart, empty ones among them; the reference works tensor by tensor."""
    if cpu_provider == "reference":  # is what all others are compared with
        sizes = sizes[:2]
    functions: dict[str, Callable[..., Any]] = {op: getattr(torch.ops.piece_ds, op).default for op in LISTS}
    chosen = [case for case in cases(sizes) if case.op in LISTS]
    for op, (number, failures) in run_cases(functions.__getitem__, chosen, "cpu").items():
        assert number > 10 * len(sizes)
        assert not failures, f"{op}: {failures[:5]}"


def pieces(x: Tensor) -> list[Tensor]:
    return [part.clone() for part in x.split([3, 0, 4, 3])]


def test_a_list_is_as_good_as_its_concatenation() -> None:
    x, index = torch.arange(1.0, 11.0), torch.tensor([0, 2, 3, 9])
    whole, parts = x.clone(), pieces(x)
    norm, count = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    ops.apply_mask_(whole, index, 2.0)
    ops.apply_mask_list_(parts, index, 2.0, norm, count)
    assert torch.cat(parts).tolist() == whole.tolist() == [2, 0, 6, 8, 0, 0, 0, 0, 0, 20]
    assert norm.item() == 4 + 36 + 64 + 400
    parts = pieces(x)
    ops.scatter_list_(parts, index, -torch.ones(4))
    assert torch.cat(parts).tolist() == [-1, 2, -1, -1, 5, 6, 7, 8, 9, -1]


def test_an_empty_list_is_nothing() -> None:
    ops.apply_mask_list_([], torch.zeros(0, dtype=torch.int64))
    ops.scatter_list_([], torch.zeros(0, dtype=torch.int64), torch.zeros(0))


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_is_refused(position: int) -> None:
    index = torch.tensor(sorted([position, 5]))
    with pytest.raises((RuntimeError, IndexError), match="outside"):
        ops.scatter_list_(pieces(torch.zeros(10)), index, torch.ones(2))


def test_lists_of_several_dtypes_are_refused(cpu_provider: str) -> None:
    if cpu_provider == "reference":
        pytest.skip("the reference takes any list")
    with pytest.raises(RuntimeError, match="one dtype"):
        ops.apply_mask_list_([torch.ones(2), torch.ones(2).bfloat16()], torch.tensor([0]))
    with pytest.raises(RuntimeError, match="ascend"):
        ops.scatter_list_([torch.ones(2)], torch.tensor([1, 0]), torch.ones(2))
