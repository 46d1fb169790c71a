"""Feed micro-batches to the device: the next one is read while the device computes."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class MicroBatchSource(Protocol):
    """Anything with a length whose item b is micro-batch b: model inputs with labels. A list of dicts is one.

    It may have an attribute `loss_of`, called with the engine and a micro-batch. It returns the mean loss to
    differentiate. Without it, that loss is engine(**micro_batch).loss. With it, a micro-batch holds whatever loss_of
    takes. A method `num_rows`, called with b, says how many rows micro-batch b has.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, b: int, /) -> Any: ...


def loss_of(source: MicroBatchSource, engine: Any, batch: Any) -> Tensor:
    """Return the mean loss of a micro-batch, as its source defines it."""
    own = getattr(source, "loss_of", None)
    loss: Tensor = engine(**batch).loss if own is None else own(engine, batch)
    return loss


def rounds_of(source: MicroBatchSource, begin: int, num_shards: int) -> list[range]:
    """Return the micro-batches of each round, from micro-batch begin on: at most num_shards, one a shard.

    A loss of the source's own may gather each row's figures from all ranks, as TRL's trainers do for their logs. That
    needs as many rows on each, so a shorter micro-batch, which is the last one, then has a round of its own.
    """
    num_all, count = len(source), getattr(source, "num_rows", None)
    rounds = [range(first, min(first + num_shards, num_all)) for first in range(begin, num_all, num_shards)]
    if getattr(source, "loss_of", None) is None or count is None or not rounds:
        return rounds
    last = rounds[-1]
    if len(last) > 1 and count(last[-1]) != count(last[0]):
        rounds[-1:] = [last[:-1], last[-1:]]
    return rounds


class BatchFeed:
    """Micro-batches of given numbers, in order, on a device."""

    def __init__(self, source: MicroBatchSource, numbers: Sequence[int], device: torch.device) -> None:
        self._source, self._numbers, self._device = source, numbers, device
        self._next = 0
        self._ahead: Any = None

    def take(self) -> Any:
        """Return the next micro-batch."""
        batch = self._ahead if self._ahead is not None else self._read()
        self._ahead = None
        assert batch is not None
        return batch

    def read_ahead(self) -> None:
        """Read the micro-batch after it, if there is one.

        Call it between forward and backward, while the host is idle.
        """
        if self._ahead is None and self._next < len(self._numbers):
            self._ahead = self._read()

    def _read(self) -> Any:
        batch = self._source[self._numbers[self._next]]
        self._next += 1
        return all_to_device(batch, self._device)


def all_to_device(value: Any, device: torch.device) -> Any:
    """Return value with its tensors on device, inside mappings, lists and tuples too.

    Other objects stay as they are.
    """
    if isinstance(value, Tensor):
        return to_device(value, device)
    if isinstance(value, Mapping):
        return {key: all_to_device(item, device) for key, item in value.items()}

    # A named tuple takes its items as arguments, not as one iterable.
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(all_to_device(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(all_to_device(item, device) for item in value)
    return value


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return tensor on device.

    Copies from the host to CUDA go through pinned memory, since a copy from pageable memory blocks the stream.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
