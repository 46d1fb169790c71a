"""MIGU: in every linear layer, select the weights of the outputs with the largest activations on the task's data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piece_ds.evaluation.batches import evaluating
from piece_ds.methods.linear import LinearWeight, linear_weights
from piece_ds.methods.request import SelectionRequest, restricted
from piece_ds.runtime.distributed import world_size
from piece_ds.state.mask import Mask, collective_device
from piece_ds.zero.statistics import MicroBatchSource


def select_migu(request: SelectionRequest) -> Mask:
    """Return the mask of MIGU. Every matrix has its part of k, taken output by output in descending order of magnitude.

    An output's magnitude is its share of the layer's L1 norm, averaged over the tokens of a micro-batch and summed over
    the task's micro-batches. It is taken once, before the task. The paper masks the gradient of every step by the
    magnitudes of that step's batch, which over a task moves every weight.

    Cost: one forward pass per micro-batch; each round gathers one number per output of the model from every rank.
    Source: MIGU (Du et al., arXiv 2406.17245).
    """
    weights = linear_weights(request.model)
    names = {weight.name for weight in weights}
    layout = restricted(request.layout, names)
    magnitudes = output_magnitudes(request.engine, request.micro_batches, weights)
    device = request.device

    # Every weight of an output has the output's score.
    score_N = torch.zeros(layout.num_owned, dtype=torch.float32, device=device)
    of = {weight.name: weight for weight in weights}
    for info, part, offset in layout.owned():
        position = torch.arange(part.start, part.stop)
        outputs = position // info.shape[1] if of[info.name].out_first else position % info.shape[1]
        score_N[offset : offset + part.numel] = magnitudes[info.name][outputs].float()
    return request.select(score_N, names, "tensor")


def output_magnitudes(engine: Any, micro_batches: MicroBatchSource, weights: list[LinearWeight]) -> dict[str, Tensor]:
    """Return each weight's normalized output magnitudes (fp64, CPU), summed over micro-batches in their order.

    The same bits for every number of ranks. A layer that a micro-batch does not use adds nothing.

    Args:
        engine: deepspeed.DeepSpeedEngine.
        micro_batches: all of the task's, the same on every rank.
        weights: the linear layers.
    """
    total = {w.name: torch.zeros(_num_outputs(w), dtype=torch.float64) for w in weights}
    num_ranks, own = world_size(), dist.get_rank() if world_size() > 1 else 0
    for first in range(0, len(micro_batches), num_ranks):
        # A rank without a micro-batch repeats one: ZeRO-3 gathers together. Nobody adds what it saw.
        b = first + own if first + own < len(micro_batches) else first
        batch = {key: value.to(engine.device) for key, value in micro_batches[b].items()}
        seen = {w.name: torch.zeros_like(total[w.name]) for w in weights}
        with evaluating(engine), _watching(weights, batch.get("attention_mask"), seen):
            engine(**batch)

        # In rank order, which is the micro-batches' order; repeated ones are left out.
        for row in _all_gather(torch.cat(list(seen.values())))[: len(micro_batches) - first]:
            for name, part in zip(total, row.split([t.numel() for t in total.values()]), strict=True):
                total[name] += part
    return total


def _num_outputs(weight: LinearWeight) -> int:
    return int(weight.module.out_features if weight.out_first else weight.module.nf)


@contextmanager
def _watching(weights: list[LinearWeight], attention: Tensor | None, seen: dict[str, Tensor]) -> Iterator[None]:
    handles = [w.module.register_forward_hook(_watch(attention, seen[w.name])) for w in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(attention: Tensor | None, total: Tensor) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that adds the mean over tokens of each output's share of the L1 norm. Padding does not count."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        # One row per token, without padding if the shapes tell which rows are padding.
        magnitude = output.detach().double().abs().reshape(-1, output.shape[-1])
        if attention is not None and output.shape[:-1] == attention.shape:
            magnitude = magnitude[attention.reshape(-1).bool()]
        share = magnitude / magnitude.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        total.add_(share.mean(0).nan_to_num(nan=0.0).cpu())

    return hook


def _all_gather(row: Tensor) -> list[Tensor]:
    """Return every rank's row, in rank order, on the CPU."""
    if world_size() == 1:
        return [row]
    rows = [torch.empty_like(row, device=collective_device()) for _ in range(world_size())]
    dist.all_gather(rows, row.to(collective_device()))
    return [row.cpu() for row in rows]
