"""At ZeRO 1 and 2 every expert of a list has a gradient in every backward, in one order, whatever is routed where."""

from types import SimpleNamespace

import torch
from support.models import make_micro_batches
from support.moe import force_routing, make_moe
from torch import nn

from piece_ds.zero.even_gradients import even_out_gradients


def backward(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The order in which gradients are finished, and the gradients."""
    order: list[str] = []
    handles = [
        param.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
        for name, param in model.named_parameters()
    ]
    model.zero_grad(set_to_none=True)
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return order, {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def engine_of(model: nn.Module, stage: int) -> SimpleNamespace:
    return SimpleNamespace(module=model, zero_optimization_stage=lambda: stage)


def test_every_expert_has_a_gradient_and_all_batches_one_order() -> None:
    model = force_routing(make_moe("listed"))
    batches = make_micro_batches()[:4]
    plain = [backward(model, batch) for batch in batches]
    assert len({tuple(order) for order, _ in plain}) > 1
    undo = even_out_gradients(engine_of(model, 2))
    even_out_gradients(engine_of(model, 2))()  # a second one adds nothing and takes nothing away
    even = [backward(model, batch) for batch in batches]
    assert len({tuple(order) for order, _ in even}) == 1
    for (_, expected), (order, found) in zip(plain, even, strict=True):
        assert set(order) == {name for name, _ in model.named_parameters()}
        for name, grad in found.items():
            assert torch.equal(grad, expected.get(name, torch.zeros_like(grad))), name
    undo()
    again = [order for order, _ in (backward(model, batch) for batch in batches)]
    assert again == [order for order, _ in plain]

    # The next task's engine evens them out again.
    even_out_gradients(engine_of(model, 2))
    assert len({tuple(backward(model, batch)[0]) for batch in batches}) == 1


def test_other_stages_and_stacked_experts_are_left_alone() -> None:
    for family, stage in (("listed", 0), ("listed", 3), ("mixtral", 2)):
        model = make_moe(family)
        before = [len(module._forward_pre_hooks) for module in model.modules()]
        even_out_gradients(engine_of(model, stage))
        assert before == [len(module._forward_pre_hooks) for module in model.modules()]
