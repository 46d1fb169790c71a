"""Sum what passes through linear layers over micro-batches: one vector a layer, the same for any number of ranks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

from piece_ds.evaluation.batches import evaluating
from piece_ds.methods.linear import LinearWeight
from piece_ds.runtime.distributed import world_size
from piece_ds.state.mask import collective_device
from piece_ds.zero.batch_feed import MicroBatchSource, all_to_device, loss_of, rounds_of
from piece_ds.zero.sequence_parallel import refuse_sequences
from piece_ds.zero.undisturbed import undisturbed

# (inputs, outputs) of a layer, one row a token, fp64 -> one value for each input or output of each token.
Measure = Callable[[Tensor, Tensor], Tensor]


def layer_sums(
    engine: Any, micro_batches: MicroBatchSource, widths: dict[str, int], weights: list[LinearWeight], measure: Measure
) -> dict[str, Tensor]:
    """Return each layer's measure: mean over a micro-batch's tokens, summed over micro-batches in order (fp64, CPU).

    The same bits for every number of ranks. A layer that a micro-batch does not use adds nothing.

    Args:
        engine: deepspeed.DeepSpeedEngine.
        micro_batches: the same on every rank. If they have a loss of their own, read is what it is differentiated by.
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
    for taken in rounds_of(micro_batches, 0, num_ranks):
        # A rank without a micro-batch repeats one: ZeRO-3 gathers together. Nobody adds what it saw.
        batch = all_to_device(micro_batches[taken[own] if own < len(taken) else taken[0]], engine.device)
        seen = {name: torch.zeros_like(vector) for name, vector in total.items()}
        if getattr(micro_batches, "loss_of", None) is None:
            passing = _Passing(is_counted=True, attention=batch.get("attention_mask"))
            with evaluating(engine), _watching(weights, passing, seen, measure):
                engine(**batch)
        else:
            passing = _Passing()
            with undisturbed(engine), _noting(engine.module, passing), _watching(weights, passing, seen, measure):
                loss_of(micro_batches, engine, batch)

        # In rank order, which is the micro-batches' order; repeated ones are left out.
        for row in _all_gather(torch.cat(list(seen.values())))[: len(taken)]:
            for name, part in zip(total, row.split([vector.numel() for vector in total.values()]), strict=True):
                total[name] += part
    return total


def num_inputs(weight: LinearWeight) -> int:
    """Return how many inputs a layer has."""
    return int(weight.module.in_features if weight.out_first else weight.module.nx)


def num_outputs(weight: LinearWeight) -> int:
    """Return how many outputs a layer has."""
    return int(weight.module.out_features if weight.out_first else weight.module.nf)


@dataclass
class _Passing:
    """What passes through the model at the moment.

    Attributes:
        is_counted: whether it is what the method reads.
        attention: its attention mask; None if it is not known.
    """

    is_counted: bool = False
    attention: Any = None


@contextmanager
def _noting(model: nn.Module, passing: _Passing) -> Iterator[None]:
    """Let passing follow what a trainer's own loss gives the model, whatever its micro-batches look like.

    Counted is what the loss is differentiated by. Such a trainer also makes completions with the model, or lets it see
    pairs for an estimate, without gradients.
    """

    def before(_: nn.Module, args: Any, options: dict[str, Any]) -> None:
        passing.is_counted, passing.attention = torch.is_grad_enabled(), options.get("attention_mask")

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watching(
    weights: list[LinearWeight], passing: _Passing, seen: dict[str, Tensor], measure: Measure
) -> Iterator[None]:
    handles = [w.module.register_forward_hook(_watch(passing, seen[w.name], measure)) for w in weights]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(passing: _Passing, total: Tensor, measure: Measure) -> Callable[[nn.Module, Any, Tensor], None]:
    """Return a hook that adds the mean over tokens of a layer's measure. Padding does not count."""

    def hook(_: nn.Module, args: Any, output: Tensor) -> None:
        if not passing.is_counted:
            return
        # One row per token, without padding if the shapes tell which rows are padding.
        inputs, outputs = (x.detach().double().reshape(-1, x.shape[-1]) for x in (args[0], output))
        if isinstance(passing.attention, Tensor) and output.shape[:-1] == passing.attention.shape:
            counted = passing.attention.reshape(-1).bool()
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
