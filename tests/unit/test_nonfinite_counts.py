"""Where the first NaN or infinite gradient entry of a statistics pass came from."""

import torch

from piece_ds.state.partition import Layout, ParameterInfo
from piece_ds.zero.nonfinite_counts import NonfiniteCounts


def test_the_first_nonfinite_entry_is_the_earliest_micro_batchs_then_the_models_first_parameter() -> None:
    layout = Layout(tuple(ParameterInfo(name, (2,), 2, True) for name in "abc"), 0, 2)
    counts = NonfiniteCounts(layout, torch.device("cpu"))
    counts.end_round(2)
    assert counts.first() is None
    for name, source in (("a", 1), ("c", 0), ("b", 0)):
        counts.slot(name, source).add_(1)
    counts.end_round(4)
    counts.slot("a", 0).add_(1)
    counts.end_round(6)
    assert counts.first() == (4, "b")
    assert counts.total() == 4
