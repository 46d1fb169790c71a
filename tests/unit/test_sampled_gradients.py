"""Sampled gradients with weights that come and go: what ZeRO-3 does to them, without its engine."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from piece_ds.update.gradients import SampledGradient
from piece_ds.zero.weights import SelectedWeights


class ComingAndGoing:
    """Fills a linear layer's weight before each forward and empties it after, as ZeRO-3 does; it is `partitioned`."""

    def __init__(self, layer: nn.Linear) -> None:
        self.param, self.whole = layer.weight, layer.weight.data.clone()
        self.param.ds_id, self.param.ds_shape = 0, layer.weight.shape  # type: ignore[attr-defined]
        layer.register_forward_pre_hook(self._fill)
        layer.register_forward_hook(self._empty)
        self._empty()

    def _fill(self, *_: Any) -> None:
        self.param.data = self.whole.clone()

    def _empty(self, *_: Any) -> None:
        self.param.data = torch.empty(0)


@pytest.mark.parametrize("num_passes", [1, 2])
def test_a_weight_that_is_released_before_its_recomputation_is_read_still_serves_it(
    num_passes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several forward passes, then one backward: each recomputes its layer, and the weight is gone again by then."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(6, 5, bias=False), [torch.randn(2, 4, 6, requires_grad=True) for _ in range(num_passes)]
    after = nn.Linear(5, 3).requires_grad_(False)  # a recomputation ends with its last layer, before that is released
    index = torch.tensor([0, 7, 13, 29])

    # By autograd alone.
    for x in inputs:
        after(layer(x).tanh()).square().sum().backward()
    assert layer.weight.grad is not None
    want = layer.weight.grad.reshape(-1)[index]
    want_inputs = [x.grad.clone() for x in inputs if x.grad is not None]

    # Released, recomputed and sampled. ZeRO-3's product saves the weight itself.
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    layer.weight.grad = None
    for x in inputs:
        x.grad = None
    kept = ComingAndGoing(layer)
    found = torch.zeros(len(index))
    selected = SelectedWeights(layer.weight, index)
    sampled = SampledGradient(layer, "weight", selected, found)
    losses: list[Tensor] = []
    for x in inputs:
        output = checkpoint(lambda value: after(layer(value).tanh()), x, use_reentrant=False)
        assert isinstance(output, Tensor)
        losses.append(output.square().sum())
    torch.stack(losses).sum().backward()
    torch.testing.assert_close(found, want)
    for x, expected in zip(inputs, want_inputs, strict=True):
        torch.testing.assert_close(x.grad, expected)
    sampled.remove()
    assert "weight" not in vars(layer)
    assert layer.weight is kept.param


def test_outside_backward_a_layer_saves_its_weight_itself_which_a_release_empties(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A view of it would keep every gathered weight of the model in memory until backward."""
    monkeypatch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
    layer = nn.Linear(6, 5, bias=False)
    kept, index = ComingAndGoing(layer), torch.tensor([0, 7, 13, 29])
    sampled = SampledGradient(layer, "weight", SelectedWeights(layer.weight, index), torch.zeros(4))
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(4, 6, requires_grad=True))
    of_layer = [tensor for tensor in saved if tensor.shape != (4, 6)]
    assert of_layer
    assert all(tensor is kept.param for tensor in of_layer)
    assert not kept.param.numel()
    sampled.remove()
