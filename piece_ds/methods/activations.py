"""Selections that spare what general text flows through: its inputs' second moments, one vector a layer.

They need no gradient of general text and no number per weight, so they serve models whose general statistics do not
fit. The text passes through the model as it is before the task.
"""

import torch
from torch import Tensor

from piece_ds.methods.layer_sums import layer_sums, num_inputs
from piece_ds.methods.linear import LinearWeight, linear_weights
from piece_ds.methods.request import SelectionRequest, restricted
from piece_ds.runtime.errors import UserError
from piece_ds.selection.quantile import quantile_of_importance
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout
from piece_ds.zero.statistics import collect_statistics
from piece_ds.zero.weights import read_whole


def select_activation_ratio(request: SelectionRequest) -> Mask:
    """Return the mask of the highest f / (a + d) in linear layers.

    f is the task's mean squared gradient, a the mean square of the weight's input on general text, and d its quantile
    over these weights. A change of the weight changes its layer's output by that input: a stands for what it costs.

    Raises:
        UserError: there is no general text, or nothing flows through the layers.
    Cost: a statistics pass over the task, a forward pass over general text; 8 bytes per owned element.
    Source: this project; inputs' second moments as cost, arXiv 2610.11076.
    """
    weights, layout = _linear(request)
    moments = input_second_moments(request, weights)
    stats = collect_statistics(request.engine, request.micro_batches, False, request.device, request.layout)
    cost_N = _per_element(layout, weights, moments, request)
    damping = quantile_of_importance(cost_N, layout, request.config.damping_quantile)

    # The statistics are of all eligible parameters, the costs only of linear layers.
    squares = {info.name: stats.square_sum[at : at + part.numel] for info, part, at in request.layout.owned()}
    owned = [squares[info.name] for info, _, _ in layout.owned()]
    f = torch.cat([*owned, stats.square_sum[:0]]) / stats.num_micro_batches
    score_N = (f / cost_N.add_(damping)).nan_to_num_(nan=0.0, posinf=float("inf"))
    return request.select(score_N, {weight.name for weight in weights}, "model")


def select_ssu(request: SelectionRequest) -> Mask:
    """Return the mask of the input columns that general text needs least, in each matrix's part of k.

    A column's importance is the mean of |weight| times the root mean square of its input on general text. Columns are
    taken in ascending order of it.

    Raises:
        UserError: there is no general text.
    Cost: a forward pass over general text; under ZeRO-3 a gather of each matrix.
    Source: SSU, arXiv 2512.04844, which freezes the columns of the highest importance and trains the others.
    """
    weights, layout = _linear(request)
    moments = input_second_moments(request, weights)
    columns, shapes, params = {}, layout.shapes(), dict(request.model.named_parameters())
    for weight in weights:
        matrix = read_whole(params[weight.name], request.engine.device).reshape(shapes[weight.name])
        magnitude = matrix.float().abs().mean(0 if weight.out_first else 1).cpu().double()
        columns[weight.name] = reversed_order((magnitude * moments[weight.name].sqrt()).float()).double()
    return request.select(_per_element(layout, weights, columns, request), {w.name for w in weights}, "tensor")


def input_second_moments(request: SelectionRequest, weights: list[LinearWeight]) -> dict[str, Tensor]:
    """Return the mean square of every input of linear layers on general text (fp64, CPU). A collective.

    Raises:
        UserError: there is no general text.
    """
    batches = request.options.general_batches
    if batches is None:
        raise UserError(f"--method {request.method} needs text that stands for general ability: --general_text")
    widths = {weight.name: num_inputs(weight) for weight in weights}
    sums = layer_sums(request.engine, batches, widths, weights, lambda inputs, outputs: inputs.square())
    return {name: total / len(batches) for name, total in sums.items()}


def reversed_order(value: Tensor) -> Tensor:
    """Return scores >= 0 that are highest where finite fp32 values >= 0 are lowest; equal values stay equal."""
    largest = torch.tensor(torch.finfo(torch.float32).max).view(torch.int32)
    return (largest - value.contiguous().view(torch.int32)).view(torch.float32)


def _linear(request: SelectionRequest) -> tuple[list[LinearWeight], Layout]:
    weights = linear_weights(request.model)
    eligible = {info.name for info in request.layout.eligible()}
    weights = [weight for weight in weights if weight.name in eligible]
    return weights, restricted(request.layout, {weight.name for weight in weights})


def _per_element(
    layout: Layout, weights: list[LinearWeight], value: dict[str, Tensor], request: SelectionRequest
) -> Tensor:
    """Return each owned element's value: that of its input. fp32, laid out by layout.owned()."""
    of = {weight.name: weight for weight in weights}
    found_N = torch.zeros(layout.num_owned, dtype=torch.float32, device=request.device)
    for info, part, offset in layout.owned():
        position = torch.arange(part.start, part.stop)
        inputs = position % info.shape[1] if of[info.name].out_first else position // info.shape[1]
        found_N[offset : offset + part.numel] = value[info.name][inputs].float().to(found_N.device)
    return found_N
