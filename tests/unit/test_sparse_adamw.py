"""SparseAdamW trains what dense AdamW with a masked gradient trains, whichever way gradients are taken."""

import copy

import pytest
import torch
from support.models import make_micro_batches, make_model
from torch import Tensor, nn

from piece_ds.methods.estimate import select
from piece_ds.models.layout import layout_of
from piece_ds.ops.sampling_rule import max_density
from piece_ds.runtime.errors import UserError
from piece_ds.update.sparse_adamw import SparseAdamW

FAMILIES = ("llama", "qwen3", "neox", "gpt2")  # no biases, tied, biases, Conv1D
# A key's bias has no gradient but rounding: with a small epsilon Adam would turn the noise into full steps.
EPSILON = 1e-3
RATIOS = {"sampled": 0.01, "dense by density": 0.2}


@pytest.mark.parametrize("gradient", ["auto", "dense"])
@pytest.mark.parametrize("ratio", RATIOS.values(), ids=list(RATIOS))
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_what_masked_dense_adamw_trains(family: str, ratio: float, gradient: str) -> None:
    model, oracle = make_model(family), make_model(family)
    mask = select(layout_of(model), "random", ratio)
    whole = mask.whole()
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    sparse = SparseAdamW(model, mask, lr=1e-3, eps=EPSILON, weight_decay=0.1, gradient=gradient)
    assert gradient == "auto" or not sparse._collection._sampled
    train(model, sparse, [sparse.values])
    train(oracle, MaskedAdamW(oracle, whole), [p for n, p in oracle.named_parameters() if n in whole])
    for (name, got), want in zip(model.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6, msg=name)
        selected = torch.zeros(got.numel(), dtype=torch.bool)
        selected[whole.get(name, torch.zeros(0).long())] = True
        assert torch.equal(got.detach().view(-1)[~selected], start[name].view(-1)[~selected])
    moved = sum(int((p.detach() != start[n]).sum()) for n, p in model.named_parameters())
    assert moved > 0.9 * mask.num_selected


class MaskedAdamW(torch.optim.AdamW):
    """The plain reading: mask the dense gradient; decay selected elements by hand."""

    def __init__(self, model: nn.Module, whole: dict[str, Tensor]) -> None:
        self.selected = [(p, whole[n]) for n, p in model.named_parameters() if n in whole]
        super().__init__([p for p, _ in self.selected], lr=1e-3, eps=EPSILON, weight_decay=0.0)

    @torch.no_grad()
    def mask_(self) -> None:
        for param, index in self.selected:
            if param.grad is not None:
                kept = param.grad.view(-1)[index].clone()
                param.grad.zero_().view(-1)[index] = kept

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for param, index in self.selected:
            param.view(-1)[index] *= 1.0 - 1e-3 * 0.1
        super().step()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, clipped: list[nn.Parameter]) -> None:
    batches = make_micro_batches("llama", 6)
    for i in range(0, len(batches), 2):
        for batch in batches[i : i + 2]:
            model(**batch).loss.backward()
        if isinstance(optimizer, MaskedAdamW):
            optimizer.mask_()
        torch.nn.utils.clip_grad_norm_(clipped, 0.5)
        optimizer.step()
        optimizer.zero_grad()


class Mixed(nn.Module):
    """Layers of two dtypes by turns."""

    def __init__(self) -> None:
        super().__init__()
        dtypes = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False, dtype=dtype) for dtype in dtypes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x.to(layer.weight.dtype)).tanh()
        return x


def test_layers_of_several_dtypes_take_the_steps_of_one_fp32_optimizer() -> None:
    torch.manual_seed(3)
    model = Mixed()
    mask = select(layout_of(model), "random", 0.4)
    index, start = mask.whole(), {name: param.detach().clone() for name, param in model.named_parameters()}
    assert len(index) == 4
    sparse = SparseAdamW(model, mask, lr=0.1, weight_decay=0.1)
    values = nn.Parameter(sparse.values.detach().clone())
    plain = torch.optim.AdamW([values], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(torch.randn(5, 6)).float().square().sum().backward()
        values.grad = sparse.values.grad.clone()  # type: ignore[union-attr]
        sparse.step()
        plain.step()
        sparse.zero_grad()
    parts = values.detach().split([positions.numel() for positions in index.values()])
    for (name, positions), part in zip(index.items(), parts, strict=True):
        got = model.get_parameter(name).detach().view(-1)
        want = start[name].view(-1).clone()
        want[positions] = part.to(want.dtype)
        torch.testing.assert_close(got, want, rtol=1e-2 if want.dtype == torch.bfloat16 else 1e-5, atol=1e-6, msg=name)
        assert float((got[positions] - start[name].view(-1)[positions]).abs().median()) > 0.1


def test_a_sampled_layer_forms_no_gradient_and_keeps_no_weight() -> None:
    """Saved tensors of a forward must not have a layer's weight among them twice: ZeRO-3 could not release it."""
    layer = nn.Linear(64, 64, bias=False)
    mask = select(layout_of(layer), "random", max_density("cpu", torch.float32, 64 * 64) / 2)
    optimizer = SparseAdamW(layer, mask)
    saved: list[Tensor] = []
    x = torch.randn(5, 64)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = layer(x)
    y.square().sum().backward()
    assert layer.weight.grad is None
    assert [t.shape for t in saved] == [x.shape]
    dense = (2 * y.detach()).t() @ x
    torch.testing.assert_close(optimizer.values.grad, dense.view(-1)[mask.index["weight"]])


def test_close_leaves_the_model_as_it_was_found() -> None:
    model = make_model("llama")
    model.get_input_embeddings().weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    optimizer = SparseAdamW(model, select(layout_of(model), "random", 0.01))
    assert model.lm_head._forward_hooks
    optimizer.close()
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks
    assert [p.requires_grad for p in model.parameters()] == before
    model(**make_micro_batches("llama", 1)[0]).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    """In bf16 too, where the weights alone would lose the digits that the fp32 values hold."""
    batches = make_micro_batches("llama", 4)

    def run(model: nn.Module, optimizer: SparseAdamW, part: slice) -> None:
        for batch in batches[part]:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight = make_model("llama").to(dtype)
    mask = select(layout_of(straight), "random", 0.01)
    run(straight, SparseAdamW(straight, mask), slice(0, 4))
    first = make_model("llama").to(dtype)
    optimizer = SparseAdamW(first, mask)
    run(first, optimizer, slice(0, 2))
    second = make_model("llama").to(dtype)
    second.load_state_dict(first.state_dict())
    resumed = SparseAdamW(second, mask)
    resumed.load_state_dict(optimizer.state_dict())
    run(second, resumed, slice(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), second.parameters(), strict=True))
    # What a resumed optimizer is saved with are its values now, not those that it was loaded with.
    assert torch.equal(resumed.state_dict()["state"][0]["value"], resumed.values.detach())


def test_a_rollback_into_the_same_optimizer_puts_every_selected_weight_back() -> None:
    """Steps between the state and its return wrote weights that the next step alone would not change back."""
    batches = make_micro_batches("llama", 5)
    model = make_model("llama").bfloat16()
    mask = select(layout_of(model), "random", 0.05)
    optimizer = SparseAdamW(model, mask, lr=1e-3)

    def step(batch: dict[str, Tensor], rate: float) -> None:
        optimizer.param_groups[0]["lr"] = rate
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(batches[0], 1e-3)
    kept = copy.deepcopy(optimizer.state_dict())
    for batch in batches[1:4]:
        step(batch, 1e-1)
    optimizer.load_state_dict(kept)
    step(batches[4], 0.0)  # values stay as they were kept; all weights must follow
    params = dict(model.named_parameters())
    held = torch.cat([params[name].detach().view(-1)[index] for name, index in mask.index.items()])
    assert torch.equal(held, optimizer.values.detach().bfloat16())


@pytest.mark.parametrize("how", ["in place", "another tensor", "loaded"])
def test_weights_that_somebody_else_wrote_hold_the_values_again_after_a_step(how: str) -> None:
    """A step writes only what changes, and must not take foreign weights for its own, not even one among many."""
    model = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)).bfloat16()
    weight, mask = model[0].weight, select(layout_of(model), "random", 0.5)
    optimizer = SparseAdamW(model, mask, lr=1e-6)
    optimizer.step()
    with torch.no_grad():
        if how == "in place":
            weight.add_(1.0)
        elif how == "another tensor":
            weight.data = weight.data + 1.0
        else:
            model.load_state_dict({"0.weight": weight + 1.0}, strict=False)
    optimizer.step()
    held = [param.detach().view(-1)[mask.index[name]] for name, param in model.named_parameters()]
    assert torch.equal(torch.cat(held), optimizer.values.detach().bfloat16())


def test_a_partitioned_model_is_refused() -> None:
    model = nn.Linear(3, 3)
    mask = select(layout_of(model), "random", 0.5)
    model.weight.ds_id = 0
    with pytest.raises(UserError, match=r"use attach\(\)"):
        SparseAdamW(model, mask)
