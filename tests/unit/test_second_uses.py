"""A weight that is used twice, or outside the layer that holds it, has the gradient that plain torch finds."""

import logging
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from support.second_uses import CHECKPOINTING, USES, WIDTH, NeverCalled, Uses, language_model, plain_gradients
from torch import Tensor, nn

from piece_ds.update.gradients import GradientCollection
from piece_ds.zero.weights import SelectedWeights


def collected(
    model: nn.Module, names: list[str], backward: Callable[[], None]
) -> tuple[dict[str, Tensor], GradientCollection]:
    """The gradients of every second element of each named parameter, sampled if that can be, frozen otherwise."""
    params = dict(model.named_parameters())
    for param in params.values():
        param.requires_grad_(False)
    weights = {name: SelectedWeights(params[name], torch.arange(0, params[name].numel(), 2)) for name in names}
    parts = {name: torch.zeros(weights[name].index.numel()) for name in names}
    with mock.patch("piece_ds.update.gradients.max_density", return_value=1.0):
        collection = GradientCollection(model, weights, parts.items(), "auto")
    backward()
    collection.check()
    collection.close()
    assert not any(param.requires_grad for param in params.values())
    assert all(param.grad is None for param in params.values())
    return parts, collection


def assert_equal_plain(model: nn.Module, backward: Callable[[], None], what: str) -> GradientCollection:
    plain = plain_gradients(model, backward)
    names = [name for name, param in model.named_parameters() if name in plain and param.numel() > 1]
    parts, collection = collected(model, names, backward)
    for name in names:
        expected = plain[name].reshape(-1)[::2]
        error = (parts[name] - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{what}: {name} is off by {error:.2%}"
    return collection


def test_every_use_of_a_weight_counts() -> None:
    for use in USES:
        for how in CHECKPOINTING:
            model = Uses(use, how)
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)
            assert_equal_plain(model, lambda model=model, x=x: model(x).backward(), f"{use}, {how}")


def test_a_penalty_outside_the_model_counts() -> None:
    model = Uses("once", "")
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))

    def backward() -> None:
        (model(x) + sum(param.square().sum() for param in model.parameters())).backward()

    assert_equal_plain(model, backward, "penalty in the loss")


def test_no_dense_gradient_is_formed_of_a_weight_that_its_layer_alone_uses() -> None:
    for how in CHECKPOINTING:
        model = Uses("once", how)
        x = torch.randn(4, WIDTH, requires_grad=True)
        collection = assert_equal_plain(model, lambda model=model, x=x: model(x).backward(), how)
        assert not [sampled.name for sampled in collection._sampled if sampled.used_elsewhere]
        assert len(collection._sampled) == 3


def test_a_layer_that_is_never_called_and_one_that_nothing_uses(caplog: pytest.LogCaptureFixture) -> None:
    model, x = NeverCalled(), torch.randn(4, WIDTH)
    with caplog.at_level(logging.WARNING):
        assert_equal_plain(model, lambda: model(x).backward(), "never called")
    assert "1 weights are used outside the products that are sampled as well: holder.weight" in caplog.text
    caplog.clear()
    model.spare = nn.Linear(WIDTH, WIDTH)
    with caplog.at_level(logging.WARNING):
        collected(model, ["spare.weight"], lambda: (model(x) * torch.ones((), requires_grad=True)).backward())
    assert "no gradient for spare.weight" in caplog.text


def test_a_layer_with_a_forward_of_its_own_is_not_sampled() -> None:
    model = Uses("once", "")
    layer = model.blocks[1]
    layer.forward = lambda x: nn.functional.linear(x, layer.weight * 2.0)  # as adapters and quantizers patch it
    x = torch.randn(4, WIDTH)
    collection = assert_equal_plain(model, lambda: model(x).backward(), "patched")
    assert [sampled.name for sampled in collection._sampled] == ["blocks.0.weight", "blocks.2.weight"]


@pytest.mark.parametrize("family", ["zamba2", "falcon_mamba"])
def test_families_with_shared_blocks_or_weights_read_past_their_layers(family: str) -> None:
    ids = torch.randint(1, 31, (2, 7), generator=torch.Generator().manual_seed(2))
    for how in CHECKPOINTING:
        model = language_model(family, how)
        assert_equal_plain(model, lambda model=model: model(ids, labels=ids).loss.backward(), f"{family}, {how}")
