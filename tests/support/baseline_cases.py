"""Engines in which a term is added to the reduced gradient, and plain PyTorch with the term in the loss."""

import torch
from torch import Tensor, nn

from support.engines import DTYPES, FP32_ACCUMULATION, Setup
from support.models import cast_parameters, make_micro_batches, make_model

NUM_STEPS, ACCUMULATION, CLIP, LEARNING_RATE, WEIGHT = 3, 2, 0.5, 1e-2, 3.0

SETUPS = {
    "stage0": Setup(0),
    "stage0-bf16": Setup(0, "bf16"),
    "stage1": Setup(1),
    "stage1-bf16": Setup(1, "bf16", config=FP32_ACCUMULATION),
    "stage2": Setup(2),
    "stage2-bf16": Setup(2, "bf16", config=FP32_ACCUMULATION),
    "stage2-fp16": Setup(2, "fp16"),
    "stage3": Setup(3),
    "stage3-bf16": Setup(3, "bf16", config=FP32_ACCUMULATION),
}


def fisher_of(name: str, shape: torch.Size) -> Tensor:
    """A made-up importance, the same everywhere."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.rand(shape, generator=generator)


def batches_of(step: int, num_ranks: int) -> list[dict[str, Tensor]]:
    """The micro-batches of one step over all ranks: that of rank r in micro-step m is number m W + r."""
    many = make_micro_batches(num=NUM_STEPS * ACCUMULATION * num_ranks)
    return many[step * ACCUMULATION * num_ranks : (step + 1) * ACCUMULATION * num_ranks]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-3, weight_decay=0.0)


def train_with_penalty(num_ranks: int, setup: Setup = SETUPS["stage0"]) -> tuple[dict[str, Tensor], list[float]]:
    """Train plainly with WEIGHT / 2 * sum of F (w - w0)^2, its gradient added; return weights, and norms before clip.

    Weights are the fp32 masters, which begin as the weights in the setup's dtype. The model computes in that dtype;
    gradients are added up and the term is made in fp32, as DeepSpeed does but at stage 0.
    """
    model = cast_parameters(cast_parameters(make_model("llama"), DTYPES[setup.dtype]), torch.float32)
    optimizer = make_optimizer(model)
    masters = dict(model.named_parameters())
    start = {name: master.detach().clone() for name, master in masters.items()}
    computing = cast_parameters(make_model("llama"), DTYPES[setup.dtype])
    if setup.stage == 0 and setup.dtype != "fp32":
        _step_without_gradient(optimizer)
    norms = []
    for step in range(NUM_STEPS):
        for name, param in computing.named_parameters():
            param.data = masters[name].detach().to(param.dtype)
            masters[name].grad = WEIGHT * fisher_of(name, param.shape) * (masters[name].detach() - start[name])
        batches = batches_of(step, num_ranks)
        for batch in batches:
            computing.zero_grad()
            computing(**batch).loss.backward()
            for name, param in computing.named_parameters():
                masters[name].grad += param.grad.float() / len(batches)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return {name: master.detach().reshape(-1) for name, master in masters.items()}, norms


def _step_without_gradient(optimizer: torch.optim.Optimizer) -> None:
    """Step as DeepSpeed's wrapper of stage 0 in 16 bits does when it is built: Adam counts one step more from then."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
