"""The sampled gradient of stacked experts is what plain torch finds, however transformers multiplies."""

import gc
import logging
import weakref
from unittest import mock

import pytest
import torch
from support.causal_classes import tiny_model
from support.models import make_micro_batches
from support.moe import NUM_EXPERTS, STACKED, make_moe
from torch import Tensor, nn

from piece_ds.update.expert_gradients import SampledExperts
from piece_ds.update.gradients import GradientCollection, collect_dense
from piece_ds.zero.weights import SelectedWeights

Batch = dict[str, Tensor]


def stacked(model: nn.Module) -> list[str]:
    return [name for name, param in model.named_parameters() if "experts" in name and param.dim() == 3]


def plain(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(**batch).loss.backward()
    found = {name: param.grad.reshape(-1).clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def sampled(
    model: nn.Module, batches: list[Batch], every: int = 3
) -> tuple[dict[str, Tensor], dict[str, Tensor], GradientCollection]:
    """(positions, gradients, collection) of every few elements of the stacked experts; all else is frozen."""
    params = dict(model.named_parameters())
    for param in params.values():
        param.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)  # so that something before the experts needs a gradient
    index = {name: torch.arange(1, params[name].numel(), every) for name in stacked(model)}
    parts = {name: torch.zeros(index[name].numel()) for name in index}
    weights = {name: SelectedWeights(params[name], index[name]) for name in index}
    with mock.patch("piece_ds.update.gradients.max_density", return_value=1.0):
        collection = GradientCollection(model, weights, parts.items(), "auto")
    for batch in batches:
        model(**batch).loss.backward()
    collection.close()
    return index, parts, collection


def assert_equal(model: nn.Module, batches: list[Batch], what: str) -> GradientCollection:
    expected = plain(model, batches)
    index, parts, collection = sampled(model, batches)
    assert parts
    for name, found in parts.items():
        wanted = expected[name][index[name]]
        error = (found - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{what}: {name} is off by {error:.1e}"
        assert found.any(), what
    assert len(collection._sampled) == len(parts), what
    assert all(param.grad is None for name, param in model.named_parameters() if name in parts)
    return collection


def test_every_way_of_multiplying_by_stacked_experts() -> None:
    for family in STACKED:
        for experts in ("grouped_mm", "eager", "batched_mm"):
            collection = assert_equal(
                make_moe(family, experts=experts), make_micro_batches()[:3], f"{family} {experts}"
            )
            # A product with copies of the experts has no formula here: it falls back to the whole gradient.
            assert all(one.used_elsewhere == (experts == "batched_mm") for one in collection._sampled)
            assert all(one.was_called == (experts != "batched_mm") for one in collection._sampled)


def test_other_models_with_stacked_experts() -> None:
    """All experts in one batch of products (Llama 4), split rows (JetMoE), one projection (Nemotron-H)."""
    for model_type in ("llama4_text", "jetmoe", "nemotron_h", "granitemoe", "qwen2_moe"):
        ids = torch.randint(4, 60, (2, 9), generator=torch.Generator().manual_seed(1))
        model = tiny_model(model_type).train()
        assert_equal(model, [{"input_ids": ids, "labels": ids}], model_type)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_computes_them_once(use_reentrant: bool) -> None:
    for family in ("mixtral", "gpt-oss"):
        model = make_moe(family)
        model.config.use_cache = False
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        assert_equal(model, make_micro_batches()[:2], family)


def test_an_error_in_the_experts_leaves_nothing_watching() -> None:
    """Gradients of a micro-batch after one that failed are counted as if that had not been."""
    model, batches = make_moe("mixtral"), make_micro_batches()[:2]
    failing = model.model.layers[0].mlp.experts
    act, before = failing.act_fn, torch._C._len_torch_function_stack()

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise FloatingPointError("of the machine")

    def fail_first(module: nn.Module, args: object) -> None:
        failing.act_fn = Broken()
        handle.remove()
        with pytest.raises(FloatingPointError):
            model(**batches[0])
        assert torch._C._len_torch_function_stack() == before
        failing.act_fn = act

    expected = plain(model, batches)
    handle = model.register_forward_pre_hook(fail_first)
    index, parts, _ = sampled(model, batches)
    assert torch._C._len_torch_function_stack() == before
    for name, found in parts.items():
        torch.testing.assert_close(found, expected[name][index[name]], rtol=1e-4, atol=1e-6)


def test_an_expert_without_a_token_gets_zero() -> None:
    model = make_moe("qwen3-moe")
    batches = make_micro_batches()[:2]
    for layer in model.model.layers:  # every token to the last two
        layer.mlp.gate.register_forward_hook(
            lambda module, args, out: (out[0], out[1], torch.full_like(out[2], NUM_EXPERTS - 1) - torch.arange(2))
        )
    collection = assert_equal(model, batches, "forced")
    index, parts, _ = sampled(model, batches)
    for name, found in parts.items():
        size = dict(model.named_parameters())[name][0].numel()
        assert not found[index[name] < 3 * size].any()
        assert found[index[name] >= 3 * size].all() or "gate_up" in name
    assert not any(one.used_elsewhere for one in collection._sampled)


def test_a_use_outside_the_products_counts_and_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = make_moe("mixtral")
    batches = make_micro_batches()[:1]
    weight = model.model.layers[1].mlp.experts.down_proj
    handle = model.register_forward_hook(lambda module, args, out: type(out)(loss=out.loss + weight.square().sum()))
    collection = assert_equal(model, batches, "penalty")
    handle.remove()
    with caplog.at_level(logging.WARNING):
        collection.check()
    assert "1 weights are used outside the products that are sampled as well: model.layers.1.mlp.experts.down_proj" in (
        caplog.text
    )


def test_only_all_experts_or_a_single_one_are_told_as_a_part_of_the_stack() -> None:
    """A product with any other view falls back to the whole gradient."""
    module = nn.Module()
    module.stack = nn.Parameter(torch.randn(4, 5, 6))
    stack, index = module.stack, torch.arange(9)
    one = SampledExperts(module, "stack", SelectedWeights(stack, index), torch.zeros(9), collect_dense)
    for stored, flip in ((True, False), (False, True)):
        for expert, view in ((None, stack), *((number, stack[number]) for number in range(4))):
            assert one._find(view.transpose(-1, -2) if flip else view) == (expert, stored)
    for other in (
        stack[:2],
        stack[1:],
        stack[::2],
        stack[1:2],
        stack[0, :2],
        stack[0, :, 1:],
        stack.view(20, 6)[2:7],
        stack[None],
        stack.view(-1),
        stack * 1,
    ):
        assert one._find(other) is None
    one.remove()


def test_bf16_rows_and_gradients() -> None:
    model = make_moe("gpt-oss").to(torch.bfloat16)
    batches = make_micro_batches()[:2]
    expected = plain(model, batches)
    index, parts, _ = sampled(model, batches)
    for name, found in parts.items():
        wanted = expected[name][index[name]].float()
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_parameter_that_is_multiplied_as_it_is_stored_is_not_kept_by_autograd() -> None:
    """ZeRO-3 lets go of what it has gathered by giving the parameter other data."""
    model = make_moe("gpt-oss")
    experts = model.model.layers[0].mlp.experts
    held = {name: param.detach().numpy().copy() for name, param in experts.named_parameters() if param.dim() == 3}
    kept = {name: weakref.ref(array) for name, array in held.items()}
    for name, array in held.items():
        getattr(experts, name).data = torch.from_numpy(array)
    weights = {name: SelectedWeights(getattr(experts, name), torch.arange(9)) for name in held}
    parts = {name: torch.zeros(9) for name in held}
    sampled = [SampledExperts(experts, name, weights[name], parts[name], collect_dense) for name in held]
    rows = torch.randn(4, 24, requires_grad=True)
    out = experts(rows, torch.tensor([[0, 1], [2, 1], [3, 4], [0, 4]]), torch.rand(4, 2))
    for name in held:
        getattr(experts, name).data = torch.empty(0)
    held.clear()
    del array
    gc.collect()
    assert out.requires_grad
    assert not [name for name, reference in kept.items() if reference() is not None]
    for one in sampled:
        one.remove()
