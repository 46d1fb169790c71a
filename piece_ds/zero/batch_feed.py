"""Micro-batches on their way to the device: the next one is read while the device computes, and nobody waits for it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class MicroBatchSource(Protocol):
    """Anything with a length whose item b is micro-batch b: model inputs with labels. A list does.

    It may have an attribute `loss_of`, called with the engine and a micro-batch, which gives the mean loss to take the
    gradient of; without one that is engine(**micro_batch).loss. A micro-batch then holds whatever loss_of takes.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, b: int, /) -> Any: ...


def loss_of(source: MicroBatchSource, engine: Any, batch: Any) -> Tensor:
    """Return the mean loss of a micro-batch as its source has it."""
    own = getattr(source, "loss_of", None)
    loss: Tensor = engine(**batch).loss if own is None else own(engine, batch)
    return loss


class BatchFeed:
    """Micro-batches of given numbers, in order, on a device."""

    def __init__(self, source: MicroBatchSource, numbers: Sequence[int], device: torch.device) -> None:
        self._source, self._numbers, self._device = source, numbers, device
        self._next = 0
        self._ahead: Any = None

    def take(self) -> Any:
        """The next micro-batch."""
        batch = self._ahead if self._ahead is not None else self._read()
        self._ahead = None
        assert batch is not None
        return batch

    def read_ahead(self) -> None:
        """Read the one after it now, if there is one: between forward and backward the host has nothing to do."""
        if self._ahead is None and self._next < len(self._numbers):
            self._ahead = self._read()

    def _read(self) -> Any:
        batch = self._source[self._numbers[self._next]]
        self._next += 1
        return all_to_device(batch, self._device)


def all_to_device(value: Any, device: torch.device) -> Any:
    """Return value with its tensors on device, inside mappings, lists and tuples too; anything else as it is."""
    if isinstance(value, Tensor):
        return to_device(value, device)
    if isinstance(value, Mapping):
        return {key: all_to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(all_to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(all_to_device(item, device) for item in value)
    return value


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on device. From the host to CUDA through pinned memory: a copy from other memory stops the stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
