"""Micro-batches on their way to the device: the next one is read while the device computes, and nobody waits for it."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class MicroBatchSource(Protocol):
    """Anything with a length whose item b is micro-batch b: model inputs with labels. A list does."""

    def __len__(self) -> int: ...

    def __getitem__(self, b: int, /) -> dict[str, Tensor]: ...


class BatchFeed:
    """Micro-batches of given numbers, in order, on a device."""

    def __init__(self, source: MicroBatchSource, numbers: Sequence[int], device: torch.device) -> None:
        self._source, self._numbers, self._device = source, numbers, device
        self._next = 0
        self._ahead: dict[str, Tensor] | None = None

    def take(self) -> dict[str, Tensor]:
        """The next micro-batch."""
        batch = self._ahead if self._ahead is not None else self._read()
        self._ahead = None
        assert batch is not None
        return batch

    def read_ahead(self) -> None:
        """Read the one after it now, if there is one: between forward and backward the host has nothing to do."""
        if self._ahead is None and self._next < len(self._numbers):
            self._ahead = self._read()

    def _read(self) -> dict[str, Tensor]:
        batch = self._source[self._numbers[self._next]]
        self._next += 1
        return {key: to_device(value, self._device) for key, value in batch.items()}


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on device. From the host to CUDA through pinned memory: a copy from other memory stops the stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
