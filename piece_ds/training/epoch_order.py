"""Draw the order of a task's rows anew for every epoch, the same on every rank."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """A new order for every pass, the same on every rank."""

    def __init__(self, draw: Callable[[torch.Generator], list[int]], length: int, seed: int) -> None:
        self._draw, self._length, self._seed, self._num_passes = draw, length, seed, 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._num_passes)
        self._num_passes += 1
        return iter(self._draw(generator))
