"""Mean loss per answer token over a whole data set. It does not depend on the number of ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.evaluation.batches import evaluating, shard_batches
from piece_ds.runtime.distributed import all_reduce_sum_, rank, world_size
from piece_ds.runtime.signals import exit_if_signalled

Batch = dict[str, Tensor]


class Rows(Protocol):
    """What is required of a data set; datasets.Dataset, torch's map-style data sets and lists all qualify."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class LossResult:
    """A loss with its weight.

    Attributes:
        sum_loss: nats summed over the counted tokens.
        num_tokens: labels that enter the loss. The first position of a row never does.
        batches: the same pair of each batch, in an order that does not depend on the number of ranks.
    """

    sum_loss: float
    num_tokens: int
    batches: tuple[tuple[float, int], ...] = ()

    @property
    def mean(self) -> float:
        """Nats per token; nan without tokens."""
        return self.sum_loss / self.num_tokens if self.num_tokens else nan


def evaluate_loss(
    model: nn.Module,
    dataset: Rows,
    collator: Callable[[Sequence[Mapping[str, Any]]], Batch],
    batch_size: int,
    device: torch.device | str,
) -> LossResult:
    """Return the exact token-weighted loss of model over dataset; call it on every rank.

    Args:
        model: a causal model of transformers, or the DeepSpeed engine around one. Called with a batch, it returns the
            mean loss over the batch's counted tokens. Its training mode is restored.
        dataset: rows with input_ids and labels, the same on every rank.
        collator: rows -> batch.
        batch_size: rows in a forward pass.
        device: where the batches go and the sums are kept.
    Returns:
        The same LossResult on every rank. Sums are in fp64 and by batch, so the number of ranks does not change them.
    Cost: ceil(ceil(rows / batch_size) / ranks) forward passes on every rank, and one all-reduce of two numbers a batch.
    """
    lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    shares = shard_batches(lengths, batch_size)
    sums = torch.zeros(len(shares) * world_size(), 2, dtype=torch.float64, device=device)  # loss, tokens

    # The mean loss of a batch times its tokens is the sum, so batches of different lengths weigh as they should.
    with evaluating(model):
        for turn, share in enumerate(shares):
            exit_if_signalled("during an evaluation")
            batch = collator([dataset[index] for index in share.indices])
            num_tokens = count_labels(batch["labels"])
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss
            if share.counted and num_tokens > 0:  # the mean over no token is nan
                mine = turn * world_size() + rank()
                sums[mine, 0] = loss.detach().to(sums) * num_tokens
                sums[mine, 1] = num_tokens

    # One exchange at the end: each batch is one rank's, so the sums are those of one rank to the bit.
    all_reduce_sum_(sums)
    batches = tuple((loss, int(num_tokens)) for loss, num_tokens in sums.tolist() if num_tokens)
    return LossResult(sum(loss for loss, _ in batches), sum(num_tokens for _, num_tokens in batches), batches)


def standard_error_of_rise(before: LossResult, after: LossResult) -> float:
    """Return the standard error of after.mean - before.mean over the text that the rows are a sample of, nats.

    Batches are the sample, each with its own number of tokens (a ratio estimator, linearised). The same rows are
    compared, so what makes one row harder than another cancels.

    Args:
        before, after: of the same rows in the same batches.
    Returns:
        0 with fewer than two batches, of which nothing can be said.
    """
    size = len(before.batches)
    if size < 2 or not before.num_tokens:
        return 0.0
    rise = after.mean - before.mean
    residuals = [
        later - earlier - rise * num_tokens
        for (earlier, num_tokens), (later, _) in zip(before.batches, after.batches, strict=True)
    ]
    return sqrt(size / (size - 1) * sum(residual**2 for residual in residuals)) / before.num_tokens


def count_labels(labels: Tensor) -> int:
    """Return how many labels of a batch enter a causal model's loss. It never predicts the first position."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())
