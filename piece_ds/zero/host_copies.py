"""Gradients on their way to sums in host memory: one is copied by the accelerator while the one before it is added.

A plain copy to the host goes through a buffer of the driver's, at a fraction of the bus's rate, and both sides wait for
it. Two pinned buffers and a stream of their own let the copy, the addition and backward go on at the same time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_BUFFERS = 2

Use = Callable[[Tensor], None]


@dataclass
class _Copy:
    """A copy that has been asked for: `host` is valid once `done` has passed; `source` must live until then."""

    host: Tensor
    source: Tensor
    done: Any
    use: Use


class HostCopies:
    """Hands tensors to functions in the order they came, each in host memory.

    The order is kept, so sums have the same bits as if every tensor were copied and added at once.
    """

    def __init__(self, source: torch.device, target: torch.device) -> None:
        """
        Args:
            source, target: where tensors are and where functions want them.
        """
        self._target = target
        self._is_needed = source.type == "cuda" and target.type == "cpu"
        self._stream = torch.cuda.Stream(source) if self._is_needed else None
        self._buffers: list[Tensor | None] = [None] * NUM_BUFFERS
        self._waiting: list[_Copy] = []
        self._num_copies = 0

    def put(self, tensor: Tensor, use: Use) -> None:
        """Call use(tensor on the target device), now or in a later put() or drain()."""
        if not self._is_needed:
            use(tensor.to(self._target))
            return
        host = self._buffer(tensor)
        self._waiting.append(_Copy(host, tensor, self._start(tensor, host), use))
        if len(self._waiting) == NUM_BUFFERS:  # this frees the buffer that the next copy takes
            self._use_oldest()

    def drain(self) -> None:
        """Use everything that is waiting."""
        while self._waiting:
            self._use_oldest()

    def forget(self) -> None:
        """Drop what is waiting, unused."""
        for copy in self._waiting:
            copy.done.synchronize()
        self._waiting.clear()

    def _buffer(self, tensor: Tensor) -> Tensor:
        """The next of the pinned buffers, of tensor's dtype and length; grown to the longest tensor so far."""
        number, num_bytes = self._num_copies % NUM_BUFFERS, tensor.numel() * tensor.element_size()
        self._num_copies += 1
        buffer = self._buffers[number]
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[number] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return buffer[:num_bytes].view(tensor.dtype)

    def _start(self, tensor: Tensor, host: Tensor) -> Any:
        """Begin the copy once what computes tensor is done; returns the event of its end."""
        stream = self._stream
        assert stream is not None
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def _use_oldest(self) -> None:
        copy = self._waiting.pop(0)
        copy.done.synchronize()
        copy.use(copy.host)
