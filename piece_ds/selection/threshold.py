"""Find the exact top-k over all ranks by radix select on histograms: only counts cross ranks, never scores.

Legend: G budget groups, D digits of one pass, P eligible parameters, W ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.runtime.distributed import all_reduce_sum_, world_size
from piece_ds.selection.scores import Run, Runs
from piece_ds.state.mask import collective_device

# The key of a non-negative fp32 score is its 31 low bits: 11 (exponent and 3 mantissa bits), then 10 and 10.
DIGITS = ((20, 11), (10, 10), (0, 10))


@dataclass(frozen=True)
class Threshold:
    """The k-th largest score of one group.

    Attributes:
        key: its 31-bit key. A score is above if its key is greater.
        num_ties_to_take: number of elements with exactly this key that belong to the selection.
    """

    key: int
    num_ties_to_take: int


def find_thresholds(runs: Runs, num_to_take: list[int], device: torch.device) -> list[Threshold]:
    """Return, for each group, the score that keeps exactly its k elements over all ranks.

    Args:
        runs: called once per pass; yields this rank's elements, in any order.
        num_to_take: k of each group, between 1 and the group's number of elements over all ranks.
        device: of the scores.
    Cost: produces the scores three times; all-reduces G * (2048 + 1024 + 1024) int64 counts, whatever the model.
    Source: radix select (Alabi et al. 2012), with the digit counts summed over ranks.
    """
    prefix = [0] * len(num_to_take)
    remaining = list(num_to_take)
    for shift, bits in DIGITS:
        counts_GD = digit_counts(runs(), shift, bits, prefix, device)

        # Elements with a greater digit are selected for certain; the search continues below them.
        for group, (digit, above) in enumerate(digits_of_kth(counts_GD, remaining)):
            remaining[group] -= above
            prefix[group] = (prefix[group] << bits) | digit
    return [Threshold(key, take) for key, take in zip(prefix, remaining, strict=True)]


def digit_counts(runs: Iterable[Run], shift: int, bits: int, prefix_G: list[int], device: torch.device) -> Tensor:
    """Return how often each digit at `shift` occurs, over all ranks, among a group's keys that start with its prefix.

    Args:
        runs: this rank's scores.
        shift, bits: position and width of the digit.
        prefix_G: of each group.
        device: of the scores.
    Returns:
        int64 [G, 2**bits], on device, or with several ranks on the device of their collectives.
    """
    counts_GD = torch.zeros(len(prefix_G), 1 << bits, dtype=torch.int64, device=device)
    for run in runs:
        ops.score_histogram_(counts_GD[run.group], *run.scores, shift, bits, prefix_G[run.group])
    return counts_GD if world_size() == 1 else all_reduce_sum_(counts_GD.to(collective_device()))


def digits_of_kth(counts_GD: Tensor, k: list[int]) -> list[tuple[int, int]]:
    """Return (digit of the k-th largest element, number of elements with a greater digit) of each group.

    Args:
        counts_GD: number of elements with each digit.
        k: of each group; the digit is 0 if there are fewer elements.
    Cost: if counts are on a GPU, the host waits once.
    """
    # The digit is the greatest that k elements reach.
    at_least_GD = counts_GD.flip(1).cumsum(1).flip(1)
    k_G = on_device(k, counts_GD.device)
    digit_G = ((at_least_GD >= k_G.unsqueeze(1)).sum(1) - 1).clamp_(min=0)
    above_G = (at_least_GD - counts_GD).gather(1, digit_G.unsqueeze(1)).squeeze(1)
    return [(digit, above) for digit, above in torch.stack([digit_G, above_G], 1).tolist()]


def on_device(numbers: list[int], device: torch.device) -> Tensor:
    """Return numbers of the host on device (int64), without waiting for it.

    On CUDA only pinned memory may be read after the call.
    """
    tensor = torch.tensor(numbers, dtype=torch.int64, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def tie_quotas(num_ties_P: Tensor, group_P: list[int], thresholds: list[Threshold], owner: int) -> list[int]:
    """Return how many of its ties rank `owner` takes in each parameter.

    The first ties of each group in (parameter, index) order are taken.

    Args:
        num_ties_P: this rank's elements at the threshold of their group, per eligible parameter, int64.
        group_P: the group of each eligible parameter.
        thresholds: of each group.
        owner: this rank.
    Cost: one all-reduce of W x P int64, for W ranks.
    """
    # Every rank's ties, on every rank.
    num_ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    table = torch.zeros(num_ranks, num_ties_P.numel(), dtype=torch.int64)
    table[owner] = num_ties_P
    table_WP = all_reduce_sum_(table.to(collective_device())).cpu()

    # Hand out the ties in order of parameter, then of rank.
    left = [threshold.num_ties_to_take for threshold in thresholds]
    quotas = []
    for parameter, group in enumerate(group_P):
        counts_W = table_WP[:, parameter]
        before = int(counts_W[:owner].sum())  # a lower rank owns lower flat indices of the same parameter
        quotas.append(max(0, min(int(counts_W[owner]), left[group] - before)))
        left[group] = max(0, left[group] - int(counts_W.sum()))
    return quotas
