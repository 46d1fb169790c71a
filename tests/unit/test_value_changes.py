"""How far a task moved its values, by hand: distances without sign, relative to the sizes of what was there."""

import math

import pytest
import torch

from piece_ds.deltas.delta import Change
from piece_ds.deltas.value_changes import change_sizes


def change(previous: list[float], values: list[float]) -> Change:
    return Change(torch.arange(len(values)), torch.tensor(values), torch.tensor(previous))


def test_sums_are_over_all_parameters_of_a_label_in_the_order_of_the_labels() -> None:
    found = change_sizes(
        [
            ("q", change([-1.0, 2.0, 0.0], [-1.5, 2.0, 0.25])),
            ("norm", change([0.0], [-0.5])),
            ("q", change([-4.0], [-3.0])),
        ]
    )
    assert list(found) == ["q", "norm"]
    q = found["q"]
    assert (q.num_values, q.num_changed) == (4, 3)
    assert (q.sum_distance, q.max_distance, q.sum_previous) == (1.75, 1.0, 7.0)
    assert (q.mean_distance, q.relative) == (1.75 / 4, 0.25)
    assert math.isnan(found["norm"].relative)
    assert found["norm"].max_distance == pytest.approx(0.5)
