"""Engines in which a term is added to the reduced gradient, and plain PyTorch with the term in the loss."""

import torch
from torch import Tensor, nn

from support.engines import FP32_ACCUMULATION, Setup
from support.models import make_micro_batches, make_model

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


def train_with_penalty(num_ranks: int) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after training with WEIGHT / 2 * sum of F (w - w0)^2 in the loss, and norms before clipping; fp32."""
    model = make_model("llama")
    optimizer = make_optimizer(model)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    norms = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        batches = batches_of(step, num_ranks)
        loss = torch.stack([model(**batch).loss for batch in batches]).mean()
        penalty = sum((fisher_of(n, p.shape) * (p - start[n]) ** 2).sum() for n, p in model.named_parameters())
        (loss + WEIGHT / 2 * penalty).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        optimizer.step()
    return {name: param.detach().reshape(-1) for name, param in model.named_parameters()}, norms
