"""Select among candidates on one rank with a GPU: sort them there, without asking the host.

With several ranks digits are counted, and the host reads each digit before the next is counted. Candidates are few, so
sorting them costs less than one such wait. From sums to positions the host reads two numbers: the sampled bound and the
number of candidates.

Legend: C candidates, K selected elements, G budget groups.
"""

import numpy as np
import torch
from torch import Tensor

from piece_ds import ops
from piece_ds.selection.threshold import on_device
from piece_ds.state.partition import Layout


def decides_alone(layout: Layout, device: torch.device) -> bool:
    """Return whether this rank has every score, on a device that the host would have to wait for."""
    return layout.num_ranks == 1 and device.type != "cpu"


def first_in_order(
    candidates: ops.Candidates, layout: Layout, group_of: dict[str, int], num_to_take: list[int]
) -> Tensor:
    """Return the k highest scores of each group. Ties go to the smaller position.

    Args:
        candidates: proven to contain the selection, without empty room (see proven()).
        layout: of one rank.
        group_of: parameter name -> its group; every candidate is of one of these parameters.
        num_to_take: k of each group.
    Returns:
        ascending positions in the flat buffer (int64, sum(num_to_take) elements), on the candidates' device.
    Cost: two sorts, of C and of K elements. Up to four with several groups, or more than 2^32 elements of a rank. The
    host does not wait.
    """
    # One group: score and position in one number, so that one sort orders by both.
    index_C = candidates.index
    if len(num_to_take) == 1 and layout.num_owned <= _MAX_PACKED:
        packed_C = _packed(candidates.score, index_C).sort(descending=True).values
        return _unpacked(packed_C[: num_to_take[0]]).sort().values

    # Both sorts are stable, so equal scores stay in order of position.
    index_C, order_C = index_C.sort()
    by_score_C = candidates.score[order_C].argsort(descending=True, stable=True)
    if len(num_to_take) == 1:
        return index_C[by_score_C[: num_to_take[0]]].sort().values

    # Candidates of a group stay in order of score. The first k of each group are taken.
    group_C, by_group_C = _groups(index_C, layout, group_of)[by_score_C].sort(stable=True)
    groups_G = torch.arange(len(num_to_take), device=index_C.device)
    place_C = torch.arange(index_C.numel(), device=index_C.device) - torch.searchsorted(group_C, groups_G)[group_C]
    is_taken_C = place_C < on_device(num_to_take, index_C.device)[group_C]
    return _compacted(index_C[by_score_C[by_group_C]], is_taken_C, sum(num_to_take)).sort().values


_MAX_PACKED = 1 << 32


def _packed(score_C: Tensor, index_C: Tensor) -> Tensor:
    """Return one int64 a candidate: greater for a greater score, and of equal scores for the smaller position.

    Args:
        score_C: fp32, not negative: its bits, read as a number, have the order of the scores.
        index_C: positions below _MAX_PACKED.
    """
    key_C = score_C.view(torch.int32).to(torch.int64) & 0x7FFFFFFF  # a sign would be that of zero or NaN
    return (key_C << 32) + (_MAX_PACKED - 1 - index_C)


def _unpacked(packed: Tensor) -> Tensor:
    """Return the positions of _packed() values."""
    return (_MAX_PACKED - 1) - (packed & (_MAX_PACKED - 1))


def fragments(position_K: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Return parameter name -> ascending flat indices in the whole parameter (int64, CPU) of flat-buffer positions.

    Args:
        position_K: ascending positions in the flat buffer.
        layout: of this rank.
    Cost: one copy to the host, for which it waits.
    """
    host_K = position_K.cpu()
    owned = list(layout.owned())
    borders = np.array([[offset, offset + part.numel] for _, part, offset in owned])
    cuts = np.searchsorted(host_K.numpy(), borders).tolist()
    return {
        info.name: host_K[low:high] + (part.start - offset)
        for (info, part, offset), (low, high) in zip(owned, cuts, strict=True)
        if high > low
    }


def _groups(index_C: Tensor, layout: Layout, group_of: dict[str, int]) -> Tensor:
    """Return the group of each position in the flat buffer."""
    owned = [(offset, group_of.get(info.name, -1)) for info, part, offset in layout.owned() if part.numel]
    begins, groups = (on_device(list(column), index_C.device) for column in zip(*owned, strict=True))
    return groups[torch.searchsorted(begins, index_C, right=True) - 1]


def _compacted(value_C: Tensor, is_taken_C: Tensor, num_taken: int) -> Tensor:
    """Return the taken values, in order. Their number is known, so the host does not wait for it."""
    place_C = torch.where(is_taken_C, is_taken_C.cumsum(0) - 1, num_taken)  # the others share a place past the end
    return value_C.new_empty(num_taken + 1).scatter_(0, place_C, value_C)[:num_taken]
