"""Divide rows into batches over the ranks, and evaluate a model without changing its modes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from piece_ds.runtime.distributed import rank, world_size


@dataclass(frozen=True)
class Batch:
    """One rank's rows of one step.

    Attributes:
        indices: rows of the data set, at least one.
        counted: False for a filler batch, whose result must not be used.
    """

    indices: list[int]
    counted: bool


def shard_batches(lengths: Sequence[int], batch_size: int) -> list[Batch]:
    """Return this rank's batches, in step order. Every rank gets a list of the same length.

    Batches hold rows of similar length, the longest first. So little is padded, and a batch too large for the memory
    fails at once. Which rows share a batch does not depend on the number of ranks. Batch b goes to rank b mod world
    size.

    Args:
        lengths: of each row, in tokens, the same on every rank.
        batch_size: rows in a batch, >= 1.
    Returns:
        ceil(ceil(rows / batch_size) / world size) batches; none if there are no rows.
    Raises:
        ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shares = [Batch(batch, counted=True) for batch in batches[rank() :: world_size()]]
    # Under ZeRO-3 a rank without a batch must still run a forward pass: fillers keep the ranks in step.
    num_steps = -(-len(batches) // world_size())
    return shares + [Batch(order[-1:], counted=False)] * (num_steps - len(shares))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put model in eval mode without gradients inside; afterwards, also after an error, restore every submodule's mode.

    A plain model.train() would switch on the dropout of a submodule that its user had put in eval mode.

    A mixture of experts leaves its load-balancing loss out meanwhile, though its configuration asks for it: it depends
    on how rows are put into batches, is not of their tokens, and transformers cannot form it while it generates.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    balanced = [config for config in configs.values() if getattr(config, "output_router_logits", False) is True]
    for config in balanced:
        config.output_router_logits = False
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for config in balanced:
            config.output_router_logits = True
