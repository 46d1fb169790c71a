"""The methods of bench/cost.py: from a fresh model to something that trains it, with DeepSpeed and without."""

from collections.abc import Callable
from typing import Any, NamedTuple

import deepspeed
import torch
from peft import LoraConfig, ShiraConfig, get_peft_model
from torch import nn

from piece_ds import attach, layout_of, prepare_compact, select
from piece_ds.update.sparse_adamw import SparseAdamW

RATIO = 0.001
ADAMW = {"lr": 1e-5, "weight_decay": 0.01}


class Trained(NamedTuple):
    """A model that can be trained.

    Attributes:
        step: makes one whole training step with a batch.
        state_bytes: bytes of masters and moments on this rank, after the first step.
        num_gradients: elements of the gradient that a step reduces over ranks.
        close: frees the model.
    """

    step: Callable[[dict[str, torch.Tensor]], None]
    state_bytes: Callable[[], int]
    num_gradients: int
    close: Callable[[], None]


def with_deepspeed(method: str, model: nn.Module, config: dict[str, Any]) -> Trained:
    """Return an engine over model, trained by method."""
    layout = layout_of(model)
    model = _adapted(method, model)
    gradient = "dense" if method == "compact-dense" else "auto"
    if method.startswith("compact"):
        parameters = list(prepare_compact(model, ratio=RATIO).parameters())
    else:
        parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    update = None
    if method.startswith(("masked", "compact")):
        mask = select(layout_of(model), "random", RATIO, device=engine.device)
        update = attach(engine, mask, selected_gradient=gradient)

    def step(batch: dict[str, torch.Tensor]) -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    def close() -> None:
        if update is not None:
            update.detach()
        engine.empty_partition_cache()
        engine.destroy()

    num_gradients = int(RATIO * layout.total) if method.startswith("compact") else sum(_numel(p) for p in parameters)
    return Trained(step, lambda: _state_bytes(engine.basic_optimizer), num_gradients, close)


def _numel(param: nn.Parameter) -> int:
    return int(getattr(param, "ds_numel", param.numel()))


def without_deepspeed(method: str, model: nn.Module) -> Trained:
    """Return plain torch in one process, with fp32 masters for 16-bit weights, as DeepSpeed keeps them."""
    model = _adapted(method, model)
    device = next(model.parameters()).device
    mask = None
    if method.startswith(("masked", "compact")):
        mask = select(layout_of(model), "random", RATIO, device=device)
    if method.startswith("compact"):
        assert mask is not None
        sparse = SparseAdamW(model, mask, gradient="dense" if method == "compact-dense" else "auto", **ADAMW)
        return Trained(
            _step_of(model, sparse, lambda: None, lambda: None),
            lambda: _state_bytes(sparse),
            mask.num_selected,
            sparse.close,
        )
    weights = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    has_masters = weights[0][1].dtype != torch.float32
    masters = [nn.Parameter(p.detach().float()) if has_masters else p for _, p in weights]
    optimizer = torch.optim.AdamW(masters, fused=True, **ADAMW)
    masks = None if mask is None else [_as_mask(p, mask.index.get(n)) for n, p in weights]

    def before_step() -> None:
        for i, (_, param) in enumerate(weights):
            if masks is not None and param.grad is not None:
                param.grad.mul_(masks[i])
            if has_masters:
                masters[i].grad, param.grad = None if param.grad is None else param.grad.float(), None

    def after_step() -> None:
        if has_masters:
            for (_, param), master in zip(weights, masters, strict=True):
                param.data.copy_(master.data)

    return Trained(
        _step_of(model, optimizer, before_step, after_step),
        lambda: _state_bytes(optimizer, count_values=has_masters),
        sum(p.numel() for p in masters),
        lambda: None,
    )


def _adapted(method: str, model: nn.Module) -> nn.Module:
    if method == "lora":
        return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.0))
    if method == "shira":
        return get_peft_model(model, ShiraConfig(r=8, target_modules="all-linear"))
    return model


def _as_mask(param: nn.Parameter, index: torch.Tensor | None) -> torch.Tensor:
    mask = torch.zeros_like(param)
    if index is not None:
        mask.view(-1)[index.to(param.device)] = 1.0
    return mask


def _step_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[dict[str, torch.Tensor]], None]:
    def step(batch: dict[str, torch.Tensor]) -> None:
        model(**batch).loss.backward()
        before()
        optimizer.step()
        after()
        optimizer.zero_grad()

    return step


def _state_bytes(optimizer: torch.optim.Optimizer, count_values: bool = True) -> int:
    """Return the bytes of moments and, if count_values, of the values that the optimizer steps.

    Values count only if they are not the model's own parameters.
    """
    moments = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    return moments + count_values * sum(p.nbytes for group in optimizer.param_groups for p in group["params"])


METHODS = ("full", "masked", "compact", "compact-dense", "lora", "shira")
