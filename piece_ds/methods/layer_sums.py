"""Sum what passes through linear layers over micro-batches: one vector a layer, the same for any number of ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from piece_ds.evaluation.batches import evaluating
from piece_ds.methods.linear import LinearWeight
from piece_ds.runtime.distributed import world_size
from piece_ds.state.mask import collective_device
from piece_ds.zero.sequence_parallel import refuse_sequences
from piece_ds.zero.statistics import MicroBatchSource

# (inputs, outputs) of a layer, one row a token, fp64 -> one value for each input or output of each token.
Measure = Callable[[Tensor, Tensor], Tensor]


def layer_sums(
    engine: Any, micro_batches: MicroBatchSource, widths: dict[str, int], weights: list[LinearWeight], measure: Measure
) -> dict[str, Tensor]:
    """Return each layer's measure: mean over a micro-batch's tokens, summed over micro-batches in order (fp64, CPU).

    The same bits for every number of ranks. A layer that a micro-batch does not use adds nothing.

    Args:
        engine: deepspeed.DeepSpeedEngine.
        micro_batches: the same on every rank.
        widths: weight's name -> length of its vector.
        weights: of the linear layers.
        measure: of every layer.
    Raises:
        UserError: ranks share rows.
    Cost: one forward pass per micro-batch; each round gathers the vectors from every rank.
    """
    refuse_sequences(engine, "a method that reads activations")
    total = {name: torch.zeros(width, dtype=torch.float64) for name, width in widths.items()}
    num_ranks, own = world_size(), dist.get_rank() if world_size() > 1 else 0
    for first in range(0, len(micro_batches), num_ranks):
        # A rank without a micro-batch repeats one: ZeRO-3 gathers together. Nobody adds what it saw.
        b = first + own if first + own < len(micro_batches) else first
        batch = {key: value.to(engine.device) for key, value in micro_batches[b].items()}
        seen = {name: torch.zeros_like(vector) for name, vector in total.items()}
        with evaluating(engine), _watching(weights, batch.get("attention_mask"), seen, measure):
            engine(**batch)

        # In rank order, which is the micro-batches' order; repeated ones are left out.
        for row in _all_gather(torch.cat(list(seen.values())))[: len(micro_batches) - first]:
            for name, part in zip(total, row.split([vector.numel() for vector in total.values()]), strict=True):
                total[name] += part
    return total


def num_inputs(weight: LinearWeight) -> int:
    """Return how many inputs a layer has."""
    return int(weight.module.in_features if weight.out_first else weight.module.nx)


def num_outputs(weight: LinearWeight) -> int:
    """Return how many outputs a layer has."""
    return int(weight.module.out_features if weight.out_first else weight.module.nf)


@contextmanager
def _watching(
    weights: list[LinearWeight], attention: Tensor | None, seen: dict[str, Tensor], measure: Measure
) -> Iterator[None]:
    handles = [w.module.register_forward_hook(_watch(attention, seen[w.name], measure)) for w in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(attention: Tensor | None, total: Tensor, measure: Measure) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that adds the mean over tokens of a layer's measure. Padding does not count."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        # One row per token, without padding if the shapes tell which rows are padding.
        inputs, outputs = (x.detach().double().reshape(-1, x.shape[-1]) for x in (args[0], output))
        if attention is not None and output.shape[:-1] == attention.shape:
            counted = attention.reshape(-1).bool()
            inputs, outputs = inputs[counted], outputs[counted]
        total.add_(measure(inputs, outputs).mean(0).nan_to_num(nan=0.0).cpu())

    return hook


def _all_gather(row: Tensor) -> list[Tensor]:
    """Return every rank's row, in rank order, on the CPU."""
    if world_size() == 1:
        return [row]
    rows = [torch.empty_like(row, device=collective_device()) for _ in range(world_size())]
    dist.all_gather(rows, row.to(collective_device()))
    return [row.cpu() for row in rows]
