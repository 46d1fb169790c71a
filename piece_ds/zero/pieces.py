"""Where parameters lie in DeepSpeed's flat buffers, and where selected elements lie because of it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + numel) of parameter `name`, lying at [offset, offset + numel) of a flat buffer."""

    name: str
    start: int
    numel: int
    offset: int


def positions_in(pieces: Iterable[Piece], index: dict[str, Tensor]) -> Tensor:
    """Ascending positions (int64, CPU) in the flat buffer of the selected elements that lie in pieces.

    Args:
        pieces: in ascending order of offset.
        index: parameter name -> ascending flat positions of its selected elements.
    """
    found = [torch.zeros(0, dtype=torch.int64)]
    for piece in pieces:
        if piece.name in index:
            whole = index[piece.name]
            low, high = torch.searchsorted(whole, torch.tensor([piece.start, piece.start + piece.numel])).tolist()
            found.append(whole[low:high] - piece.start + piece.offset)
    return torch.cat(found)


def cut(pieces: Iterable[Piece], begin: int, end: int) -> list[Piece]:
    """The parts of pieces inside [begin, end) of the flat buffer, with offsets counted from begin."""
    result = []
    for piece in pieces:
        low, high = max(piece.offset, begin), min(piece.offset + piece.numel, end)
        if low < high:
            result.append(Piece(piece.name, piece.start + low - piece.offset, high - low, low - begin))
    return result
