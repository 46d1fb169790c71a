"""A sampled gradient counts in the backwards in which a dense one would, and in no other."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from support.moe import STACKED, make_moe
from torch import Tensor, nn

from piece_ds.runtime.errors import UserError
from piece_ds.update.gradients import GradientCollection
from piece_ds.zero.weights import SelectedWeights


def collecting(model: nn.Module, names: list[str], gradient: str) -> tuple[Tensor, GradientCollection]:
    params = dict(model.named_parameters())
    for param in params.values():
        param.requires_grad_(False)
    weights = {name: SelectedWeights(params[name], torch.arange(0, params[name].numel(), 3)) for name in names}
    total = torch.zeros(sum(weight.index.numel() for weight in weights.values()))
    parts = zip(names, total.split([weight.index.numel() for weight in weights.values()]), strict=True)
    with mock.patch("piece_ds.update.gradients.max_density", return_value=1.0):
        return total, GradientCollection(model, weights, parts, gradient)


def linear() -> tuple[nn.Module, list[str]]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), ["0.weight", "2.weight"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_of_an_input_alone_adds_nothing(checkpointed: bool) -> None:
    """As adversarial training and attributions take it between the steps' backwards."""
    found = {}
    for gradient in ("dense", "auto"):
        model, names = linear()
        total, collection = collecting(model, names, gradient)
        x = torch.linspace(-1, 1, 10).view(2, 5).requires_grad_(True)
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        assert not total.any()
        model(x + 0.1 * grad.sign()).square().sum().backward()
        found[gradient] = total
        collection.close()
    assert found["dense"].any()
    torch.testing.assert_close(found["auto"], found["dense"])


def test_experts_add_nothing_to_the_gradient_of_an_input_either() -> None:
    model = make_moe(STACKED[0])
    names = [name for name, param in model.named_parameters() if "experts" in name and param.dim() == 3]
    total, collection = collecting(model, names, "auto")
    embedded = model.get_input_embeddings()(torch.arange(6)[None]).detach().requires_grad_(True)
    loss = model(inputs_embeds=embedded).logits.square().mean()
    torch.autograd.grad(loss, embedded, retain_graph=True)
    assert not total.any()
    loss.backward()
    assert total.any()
    collection.close()


def test_a_second_derivative_is_refused_not_half_of_it() -> None:
    model, names = linear()
    _, collection = collecting(model, names, "auto")
    x = torch.ones(2, 5, requires_grad=True)
    with pytest.raises(UserError, match="selected_gradient='dense'"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    collection.close()


class InPlace(nn.Module):
    """Change what it is given."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._change = change

    def forward(self, x: Tensor) -> Tensor:
        return self._change(x)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 5), (2, 3, 5)])
@pytest.mark.parametrize("change", [torch.tanh_, torch.relu_, lambda x: x.mul_(2).add_(1)])
def test_what_follows_a_layer_may_change_its_output_in_place(
    change: Callable[[Tensor], Tensor], shape: tuple[int, ...], checkpointed: bool
) -> None:
    found = {}
    for gradient in ("dense", "auto"):
        model, names = linear()
        model[1] = InPlace(change)
        model.append(InPlace(change))
        total, _ = collecting(model, names, gradient)
        x = torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)
        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        out.square().sum().backward()
        found[gradient] = total
    assert found["dense"].count_nonzero() > 0
    torch.testing.assert_close(found["auto"], found["dense"])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", [lambda _, __, out: 2 * out, lambda _, __, out: out.tanh(), lambda _, __, out: None])
def test_hooks_of_the_user_may_return_another_output(hook: Callable[..., Tensor | None], when: str) -> None:
    """As steering of activations does. The formula is of the layer's own output, whoever's hooks came first."""
    found = {}
    for gradient in ("dense", "auto"):
        model, names = linear()
        if when == "before":
            model[2].register_forward_hook(hook)
        total, _ = collecting(model, names, gradient)
        if when == "after":
            model[2].register_forward_hook(hook)
        model(torch.linspace(-1, 1, 10).view(2, 5)).square().sum().backward()
        found[gradient] = total
    torch.testing.assert_close(found["auto"], found["dense"])
