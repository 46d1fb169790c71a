"""Every op brings its provider itself, for the device of its tensors: any of them may be a program's first."""

from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from piece_ds import ops
from piece_ds.ops import backends, masks, scores, selected

N = 16
NO_KERNELS = {"Candidates", "empty_candidates", "load", "provider", "reference", "schema"}
ADAMW: dict[str, Any] = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "step": 1}


class Loaded(Exception):
    """Raised in the place of loading."""


def vector(n: int = N) -> torch.Tensor:
    return torch.ones(n)


def one() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int64)


INDEX = torch.arange(3)
CALLS: dict[str, Callable[[], Any]] = {
    "accumulate_": lambda: ops.accumulate_(vector(), vector(), vector(), 1.0, one()),
    "accumulate_filter_": lambda: ops.accumulate_filter_(
        *(vector(), vector(), vector(), 1.0, one(), 1.0, 0.0, 0), ops.empty_candidates(N, "cpu")
    ),
    "apply_mask_": lambda: ops.apply_mask_(vector(), INDEX),
    "apply_mask_list_": lambda: ops.apply_mask_list_([vector()], INDEX),
    "filter_": lambda: ops.filter_(None, vector(), 1.0, 0.0, 0, ops.empty_candidates(N, "cpu")),
    "gather_add_": lambda: ops.gather_add_(vector(), INDEX, 1.0, vector(3)),
    "index_to_mask": lambda: ops.index_to_mask(INDEX, N),
    "mask_to_index": lambda: ops.mask_to_index(torch.ones(2, dtype=torch.uint8)),
    "sampled_gradient_": lambda: ops.sampled_gradient_(torch.ones(2, 4), torch.ones(2, 4), INDEX, 1.0, vector(3)),
    "scatter_list_": lambda: ops.scatter_list_([vector()], INDEX, vector(3)),
    "score": lambda: ops.score(None, vector()),
    "score_histogram_": lambda: ops.score_histogram_(torch.zeros(4, dtype=torch.int64), None, vector(), 1.0, 29, 2, 0),
    "select_above": lambda: ops.select_above(None, vector(), 1.0, 0, 0),
    "sparse_adamw_": lambda: ops.sparse_adamw_(*(vector(3) for _ in range(4)), vector(), INDEX, **ADAMW),
    "sparse_adamw_list_": lambda: ops.sparse_adamw_list_(*(vector(3) for _ in range(4)), [vector()], INDEX, **ADAMW),
}


def test_every_op_stands_here() -> None:
    assert set(CALLS) == set(ops.__all__) - NO_KERNELS


@pytest.mark.parametrize("name", CALLS)
def test_an_op_loads_its_provider_before_it_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = mock.create_autospec(backends.load_for, side_effect=Loaded)
    module: ModuleType
    for module in (masks, scores, selected):
        monkeypatch.setattr(module, "load_for", load)
    with pytest.raises(Loaded):
        CALLS[name]()
    assert load.call_args.args[0].device == torch.device("cpu")
