"""MIGU: in every linear layer, select the weights of the outputs with the largest activations on the task's data."""

from typing import Any

import torch
from torch import Tensor

from piece_ds.methods.layer_sums import layer_sums, num_outputs
from piece_ds.methods.linear import LinearWeight, linear_weights
from piece_ds.methods.request import SelectionRequest, restricted
from piece_ds.state.mask import Mask
from piece_ds.zero.statistics import MicroBatchSource


def select_migu(request: SelectionRequest) -> Mask:
    """Return the mask of MIGU. Every matrix has its part of k, taken output by output in descending order of magnitude.

    An output's magnitude is its share of the layer's L1 norm, averaged over the tokens of a micro-batch and summed over
    the task's micro-batches. It is taken once, before the task. The paper masks the gradient of every step by the
    magnitudes of that step's batch, which over a task moves every weight.

    Cost: one forward pass per micro-batch; each round gathers one number per output of the model from every rank.
    Source: MIGU (Du et al., arXiv 2406.17245).
    """
    weights = linear_weights(request.model)
    names = {weight.name for weight in weights}
    layout = restricted(request.layout, names)
    magnitudes = output_magnitudes(request.engine, request.micro_batches, weights)
    device = request.device

    # Every weight of an output has the output's score.
    score_N = torch.zeros(layout.num_owned, dtype=torch.float32, device=device)
    of = {weight.name: weight for weight in weights}
    for info, part, offset in layout.owned():
        position = torch.arange(part.start, part.stop)
        outputs = position // info.shape[1] if of[info.name].out_first else position % info.shape[1]
        score_N[offset : offset + part.numel] = magnitudes[info.name][outputs].float()
    return request.select(score_N, names, "tensor")


def output_magnitudes(engine: Any, micro_batches: MicroBatchSource, weights: list[LinearWeight]) -> dict[str, Tensor]:
    """Return each weight's normalized output magnitudes (fp64, CPU), as layer_sums() adds them up.

    Args:
        engine, micro_batches, weights: as in layer_sums().
    """
    widths = {weight.name: num_outputs(weight) for weight in weights}
    return layer_sums(engine, micro_batches, widths, weights, _shares)


def _shares(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return each output's share of its token's L1 norm."""
    magnitude = outputs.abs()
    return magnitude / magnitude.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
