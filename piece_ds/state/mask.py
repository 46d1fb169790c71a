"""Say which elements are selected. The working form is a sorted index list; packed bits exist only in files.

At a density d the list costs 32 d bits per element in a file's int32, a bit mask costs 1. They are equal at d = 1/32,
and 0.1 % is far below.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from piece_ds.runtime.distributed import collective_device, world_size
from piece_ds.state.partition import Layout


@dataclass(frozen=True)
class Mask:
    """Selected elements of a model, each rank holding those it owns.

    Attributes:
        layout: the model's parameters and this rank's ranges of them.
        index: parameter name -> ascending flat row-major positions in the whole parameter (int64, CPU), only those
            inside this rank's range. A parameter without a key has nothing selected on this rank.
        num_selected: selected elements over all ranks.
        method, ratio: how it was made.
        proposed_ratio: selected / all elements that its scores propose; None if they propose none.
        base_fingerprint: of the weights that it was selected on, as deltas name their base; None if that is not known.
    """

    layout: Layout
    index: dict[str, Tensor]
    num_selected: int
    method: str = "unknown"
    ratio: float = 0.0
    proposed_ratio: float | None = None
    base_fingerprint: str | None = None

    def whole(self) -> dict[str, Tensor]:
        """Return parameter name -> ascending positions over all ranks, on every rank. A collective.

        Cost: 8 bytes per selected element received by every rank, one exchange for the whole model.
        """
        return gather_fragments(self.layout, self.index, dict.fromkeys(self.layout.shapes(), torch.int64))


def gather_fragments(
    layout: Layout, fragments: dict[str, Tensor], dtype_of: dict[str, torch.dtype]
) -> dict[str, Tensor]:
    """Concatenate every rank's 1-D fragment of each parameter, in rank order, on every rank. A collective.

    Args:
        layout: of the model; names the parameters and their order.
        fragments: parameter name -> this rank's values (CPU); absent if it has none.
        dtype_of: parameter name -> dtype of its fragments, the same on every rank.
    Returns:
        parameter name -> CPU tensor; absent if no rank has any.
    """
    # One rank: only the order is to be made canonical.
    if layout.num_ranks == 1:
        ordered = {info.name: fragments[info.name] for info in layout.parameters if info.name in fragments}
        return {name: values for name, values in ordered.items() if values.numel()}

    # Send all parameters as one row of bytes, with their lengths.
    names = [info.name for info in layout.parameters]
    rows = [fragments[n].contiguous().view(torch.uint8) if n in fragments else torch.zeros(0).byte() for n in names]
    counts_WP, bytes_W = _all_gather_bytes(torch.tensor([row.numel() for row in rows]), torch.cat(rows))

    # Put each parameter together again.
    pieces: dict[str, list[Tensor]] = {}
    for counts_P, received in zip(counts_WP, bytes_W, strict=True):  # rank order is ascending order of ranges
        for name, piece in zip(names, received.split(counts_P.tolist()), strict=True):
            if piece.numel():
                pieces.setdefault(name, []).append(piece.clone().view(dtype_of[name]))
    return {name: torch.cat(pieces[name]) for name in names if name in pieces}


def _all_gather_bytes(counts: Tensor, values: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return every rank's counts (int64, equal lengths) and values (uint8), in rank order.

    Args:
        counts: bytes of each parameter on this rank.
        values: as many bytes as the counts' sum.
    """
    device = collective_device()
    gathered = [torch.empty_like(counts, device=device) for _ in range(world_size())]
    dist.all_gather(gathered, counts.to(device))

    # all_gather needs equal sizes, so values are padded to the longest.
    longest = max(int(c.sum()) for c in gathered)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: values.numel()] = values.to(device)
    lists = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(lists, padded)
    all_counts = [c.cpu() for c in gathered]
    return all_counts, [row[: int(c.sum())].cpu() for row, c in zip(lists, all_counts, strict=True)]
