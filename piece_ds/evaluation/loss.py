"""Mean loss per answer token over a whole data set. It does not depend on the number of ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from piece_ds.data.rows import IGNORED_LABEL
from piece_ds.evaluation.batches import evaluating, shard_batches
from piece_ds.runtime.distributed import all_reduce_sum_
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
    """

    sum_loss: float
    num_tokens: int

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
        The same LossResult on every rank. Sums are in fp64, so the number of ranks changes them only by rounding.
    Cost: ceil(ceil(rows / batch_size) / ranks) forward passes on every rank, and one all-reduce of two numbers.
    """
    lengths = [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens

    # The mean loss of a batch times its tokens is the sum, so batches of different lengths weigh as they should.
    with evaluating(model):
        for share in shard_batches(lengths, batch_size):
            exit_if_signalled("during an evaluation")
            batch = collator([dataset[index] for index in share.indices])
            num_tokens = count_labels(batch["labels"])
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss
            if share.counted and num_tokens > 0:  # the mean over no token is nan
                sums[0] += loss.detach().to(sums) * num_tokens
                sums[1] += num_tokens

    # One sum over ranks at the end.
    all_reduce_sum_(sums)
    return LossResult(sum_loss=sums[0].item(), num_tokens=int(sums[1].item()))


def count_labels(labels: Tensor) -> int:
    """Return how many labels of a batch enter a causal model's loss. It never predicts the first position."""
    return int((labels[:, 1:] != IGNORED_LABEL).sum())
