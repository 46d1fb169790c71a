"""Send every rank's gradient to the ranks that own its elements, bucket by bucket, without summing on the way.

A reduce-scatter would add in an order that depends on the number of ranks. It would also need a second one for the
squares. An all-to-all hands the owner every rank's gradient unreduced, and moves it once, in its own dtype. In bf16
that is 2 n bytes per rank, while two fp32 reduce-scatters move 8 n. The owner squares and adds in micro-batch order, so
the sums have the same bits for every number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from piece_ds.state.partition import Layout, ParameterInfo, owned_range


@dataclass(frozen=True)
class Slice:
    """For every rank: elements [begin, begin + numel) of its own range of a parameter (fewer at the range's end)."""

    info: ParameterInfo
    begin: int
    numel: int
    last: bool


def plan_buckets(layout: Layout, bucket_elements: int) -> list[list[Slice]]:
    """Return slices of all eligible parameters, last parameter first (the order in which backward finishes them).

    No bucket holds more than bucket_elements over all ranks, unless one element a rank is already more.
    """
    per_rank = max(1, bucket_elements // layout.num_ranks)
    buckets: list[list[Slice]] = [[]]
    room = per_rank
    for info in reversed(layout.eligible()):
        # Every rank owns at most `chunk` elements of a parameter; slices never cross its end.
        chunk = max(owned_range(info, owner, layout.num_ranks).numel for owner in range(layout.num_ranks))
        for begin in range(0, chunk, per_rank):
            numel = min(per_rank, chunk - begin)
            if numel > room:
                buckets.append([])
                room = per_rank
            buckets[-1].append(Slice(info, begin, numel, last=begin + numel >= chunk))
            room -= numel
    return buckets


def slice_range(part: Slice, owner: int, num_ranks: int) -> tuple[int, int]:
    """Return (start, stop) in the whole parameter of what `owner` owns of a slice; start == stop if it owns nothing."""
    partition = owned_range(part.info, owner, num_ranks)
    start = min(partition.start + part.begin, partition.stop)
    return start, min(start + part.numel, partition.stop)


def exchange(bucket: list[Slice], grads: dict[str, Tensor], layout: Layout) -> Iterator[tuple[int, Slice, Tensor]]:
    """Yield (sending rank, slice, that rank's gradient of what this rank owns of the slice), in rank order.

    Args:
        bucket: slices whose gradients are complete on every rank.
        grads: parameter name -> this rank's whole gradient, flat, all of one dtype.
        layout: of the model.
    Cost: one all-to-all of the bucket; two buckets of memory (one to send, one to receive).
    """
    ranks = range(layout.num_ranks)

    # One rank owns everything: no copy and no communication.
    if layout.num_ranks == 1:
        for part in bucket:
            start, stop = slice_range(part, 0, 1)
            yield 0, part, grads[part.info.name][start:stop]
        return

    # Lay out what goes to each owner, one owner after the other.
    ranges = [[slice_range(part, owner, layout.num_ranks) for part in bucket] for owner in ranks]
    sent = torch.cat([grads[p.info.name][a:b] for row in ranges for p, (a, b) in zip(bucket, row, strict=True)])
    sizes = [sum(b - a for a, b in row) for row in ranges]

    # Every rank sends this one an equal amount, since all ranges are of the same owner.
    mine = sizes[layout.rank]
    received = torch.empty(mine * layout.num_ranks, dtype=sent.dtype, device=sent.device)
    bits = torch.float16 if sent.dtype == torch.bfloat16 else sent.dtype  # gloo knows no bf16; only bits are moved
    dist.all_to_all_single(received.view(bits), sent.view(bits), [mine] * layout.num_ranks, sizes)

    # Hand out what came, in rank order, which is micro-batch order.
    offset = 0
    for source in ranks:
        for part, (start, stop) in zip(bucket, ranges[layout.rank], strict=True):
            yield source, part, received[offset : offset + stop - start]
            offset += stop - start
