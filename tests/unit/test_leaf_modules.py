"""What is told when a backward leaves a ZeRO-3 leaf module, without DeepSpeed: only its mark on the parameters."""

import torch
from torch import Tensor, nn

from piece_ds.zero.leaf_modules import LeafModules


class Model(nn.Module):
    """A leaf of two layers, of which a call may use one; called `times` over."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times, self.before, self.leaf = times, nn.Linear(3, 3), Leaf()
        for param in self.leaf.parameters():
            param.ds_z3_leaf_module = self.leaf

    def forward(self, x: Tensor, use_second: bool = True) -> Tensor:
        x = self.before(x)
        for _ in range(self.times):
            x = self.leaf(x, use_second)
        return x.square().mean()


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, use_second: bool) -> Tensor:
        return self.second(self.first(x)) if use_second else self.first(x)


def one_round(model: Model, leaves: LeafModules, use_second: bool) -> None:
    """Forward and backward, as the statistics pass does them."""
    leaves.begin_round()
    loss = model(torch.ones(2, 3), use_second)
    leaves.end_forward()
    loss.backward()


def run(model: Model, use_second: bool = True) -> tuple[list[set[str]], set[str]]:
    """(parameters told, those that had a gradient by then)."""
    leaves = LeafModules(model)
    assert leaves.names == {name for name, _ in model.named_parameters() if name.startswith("leaf.")}
    had: set[str] = set()
    told: list[set[str]] = []
    handles = [
        param.register_post_accumulate_grad_hook(lambda _, name=name: had.add(name))
        for name, param in model.named_parameters()
        if param.requires_grad
    ]
    handles += leaves.hooks(lambda names: told.append(set(names) | {f"had {name}" for name in had}))
    for _ in range(2):
        one_round(model, leaves, use_second)
    for handle in handles:
        handle.remove()
    left = {name for name, param in model.named_parameters() if param.grad is not None}
    return told, left


def test_a_leaf_is_told_once_all_its_gradients_have_come_and_keeps_none() -> None:
    for use_second in (True, False):
        told, left = run(Model(), use_second)
        names = {f"leaf.{layer}.{kind}" for layer in ("first", "second") for kind in ("weight", "bias")}
        used = {name for name in names if use_second or "first" in name}
        assert told[0] == names | {f"had {name}" for name in used}
        assert len(told) == 2
        assert left == {"before.weight", "before.bias"}


def test_a_leaf_that_is_called_twice_or_whose_input_needs_no_gradient_is_not_told() -> None:
    assert run(Model(times=2))[0] == []
    model = Model()
    for param in model.before.parameters():
        param.requires_grad_(False)
    assert run(model)[0] == []


def test_checkpointing_calls_a_leaf_again_and_it_counts_once() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Model):
        def forward(self, x: Tensor, use_second: bool = True) -> Tensor:
            return checkpoint(self.leaf, self.before(x), use_second, use_reentrant=self.reentrant).square().mean()

    for Checkpointed.reentrant in (True, False):
        assert len(run(Checkpointed())[0]) == 2


def test_a_marked_part_of_a_layer_that_is_gathered_whole_waits_until_backward_leaves_the_layer() -> None:
    model = Model()
    model.leaf.piece_ds_whole = 1
    model.leaf._z3_leaf = True
    assert LeafModules(model).names == set()
    model.leaf.second._z3_leaf = True
    leaves = LeafModules(model)
    assert leaves.names == {"leaf.second.weight", "leaf.second.bias"}
    told: list[set[str]] = []
    handles = leaves.hooks(lambda names: told.append(set(names)))
    one_round(model, leaves, use_second=False)
    for handle in handles:
        handle.remove()
    assert told == [leaves.names]
