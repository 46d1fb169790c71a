"""SHiRA-random: draw positions uniformly in every linear matrix, as many as peft's ShiraConfig(r) draws."""

import torch
from torch import Tensor, nn

from piece_ds.methods.linear import linear_weights
from piece_ds.methods.request import SelectionRequest, restricted
from piece_ds.runtime.errors import UserError
from piece_ds.selection.budget import num_to_select, share_out
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout


def shira_counts(model: nn.Module, layout: Layout, ratio: float) -> dict[str, int]:
    """Return parameter name -> elements to select: k of the whole model, shared out by rows + columns.

    peft gives a matrix r (rows + columns) positions. Here r is k / sum of (rows + columns), which need not be whole.

    Raises:
        UserError: there is no linear layer, or a matrix has fewer elements than its share.
    """
    # Only linear layers that may be selected take part.
    names = {weight.name for weight in linear_weights(model)}
    infos = restricted(layout, names).eligible()
    if not infos:
        raise UserError("--method shira selects in linear layers, and the model has none that may be trained")
    shares = share_out(num_to_select(ratio, layout.total), [sum(info.shape) for info in infos])

    # A share goes by rows + columns, so a small matrix may get more than it has.
    for info, share in zip(infos, shares, strict=True):
        if share > info.numel:
            raise UserError(
                f"--method shira: {info.name} has {info.numel} elements and a share of {share}: "
                f"lower --mask_ratio {ratio}"
            )
    return {info.name: share for info, share in zip(infos, shares, strict=True)}


def select_shira(request: SelectionRequest) -> Mask:
    """Return the mask of drawn positions. With peft's seed and a whole r, they are exactly peft's positions.

    Cost: 8 bytes per element of the largest matrix on every rank, for its permutation.
    Source: SHiRA (Bhardwaj et al., arXiv 2406.13175); peft.tuners.shira.mask_functions.random_mask.
    """
    counts = shira_counts(request.model, request.layout, request.ratio)
    index = {}
    for info in request.layout.eligible():
        if counts.get(info.name, 0):
            # Every rank draws for the whole matrix and keeps its own range.
            part = request.layout.partition(info)
            whole = _drawn(info.numel, counts[info.name], request.config.seed)
            own = whole[(whole >= part.start) & (whole < part.stop)]
            if own.numel():
                index[info.name] = own
    return request.mask(index, sum(counts.values()))


def _drawn(numel: int, count: int, seed: int) -> Tensor:
    """Return count positions out of numel, ascending. The generator starts anew for each matrix, as in peft."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(numel, generator=generator)[:count].sort().values
