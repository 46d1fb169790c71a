"""The exact median of what lies on all ranks."""

import torch
from torch import Tensor

from piece_ds.runtime.distributed import all_reduce_sum_, collective_device
from piece_ds.runtime.errors import UserError
from piece_ds.selection.estimators import PIECE_F
from piece_ds.selection.scores import ScoreSource
from piece_ds.selection.threshold import find_thresholds
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats


def median_above_zero(value_N: Tensor, layout: Layout) -> float:
    """Return the (lower) median of the positive numbers among all ranks' values >= 0. A collective.

    An order statistic: the same bits for every number of ranks. Zeros are left out, since a model whose general text
    leaves more than half of its weights without a gradient would have the median 0, which damps nothing.

    Args:
        value_N: fp32, >= 0, laid out by layout.owned().
        layout: of the model.
    Raises:
        UserError: there is none.
    Cost: four reads of value_N; 32 KiB of communication.
    """
    positive = torch.tensor([int((value_N > 0).sum())])
    count = int(all_reduce_sum_(positive.to(collective_device())))
    if count == 0:
        raise UserError("the text that stands for general ability gives no gradient: is every answer empty?")
    group_of = {info.name: 0 for info in layout.eligible()}
    stats = GradientStats(layout, value_N, None)
    runs = ScoreSource(
        layout=layout,
        group_of=group_of,
        scorer=PIECE_F,
        stats=stats,
        weight_of=None,
        device=value_N.device,
        lam=1.0,
        seed=0,
    )
    (threshold,) = find_thresholds(runs, [count // 2 + 1], value_N.device)
    return float(torch.tensor(threshold.key, dtype=torch.int32).view(torch.float32))
