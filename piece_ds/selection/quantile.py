"""Find an exact quantile over all ranks."""

import torch
from torch import Tensor

from piece_ds.runtime.distributed import all_reduce_sum_, collective_device
from piece_ds.runtime.errors import UserError
from piece_ds.selection.estimators import PIECE_F
from piece_ds.selection.scores import ScoreSource
from piece_ds.selection.threshold import find_thresholds
from piece_ds.state.partition import Layout
from piece_ds.state.statistics import GradientStats


def quantile_of_importance(value_N: Tensor, layout: Layout, quantile: float = 0.5) -> float:
    """Return the (lower) quantile of all ranks' values >= 0; of the positive ones if it would be 0. A collective.

    As an order statistic it has the same bits for every number of ranks. If general text leaves more than half of a
    model's weights without a gradient, their median is 0, which would damp nothing. Then zeros are left out.

    Args:
        value_N: fp32, >= 0, laid out by layout.owned().
        layout: of the model.
        quantile: in [0, 1]; 0.5 is the median.
    Raises:
        UserError: no value is positive.
    Cost: four reads of value_N; 32 KiB of communication.
    """
    # Which rank from the top the quantile has.
    positive = torch.tensor([int((value_N > 0).sum())])
    num_positive = int(all_reduce_sum_(positive.to(collective_device())))
    if num_positive == 0:
        raise UserError("the text that stands for general ability gives no gradient: is every answer empty?")
    from_above = _from_above(layout.num_eligible, quantile)
    if from_above > num_positive:
        from_above = _from_above(num_positive, quantile)

    # PIECE-F scores are the values themselves, so selection's threshold is the quantile.
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
    (threshold,) = find_thresholds(runs, [from_above], value_N.device)
    return float(torch.tensor(threshold.key, dtype=torch.int32).view(torch.float32))


def _from_above(num_values: int, quantile: float) -> int:
    """Return how many values from the highest a lower quantile is, 1 for the highest itself."""
    return num_values - int(quantile * (num_values - 1))
