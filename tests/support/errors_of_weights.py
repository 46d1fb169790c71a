"""How far trained weights are from those that they should be, relative to how far training moved them."""

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def largest_error(got: Weights, want: Weights, start: Weights) -> float:
    """Return the largest |got - want| over the largest |want - start|, of the parameters of want."""
    return float(_apart(got, want).max() / _apart(want, start).max())


def mean_error(got: Weights, want: Weights, start: Weights) -> float:
    """Return the mean |got - want| over the mean |want - start|, of the parameters of want.

    For 16 bits. There a gradient near zero may round to either sign, and Adam steps by the whole rate all the same. So
    a single weight may be a step off, on some processors alone, where all others are right.
    """
    return float(_apart(got, want).mean() / _apart(want, start).mean())


def _apart(first: Weights, second: Weights) -> Tensor:
    names = [name for name in first if name in second]
    return torch.cat([(first[n].float() - second[n].float()).abs().view(-1) for n in names])
