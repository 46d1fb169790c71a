"""Copy gradients to sums in host memory: the accelerator copies one while the host adds the one before it.

A plain copy to the host goes through a buffer of the driver, at a fraction of the bus's rate, and both sides wait for
it. Two pinned buffers and a separate stream let copy, addition and backward overlap.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NUM_BUFFERS = 2  # one is filled while the other is added

Use = Callable[[Tensor], None]


@dataclass
class _Copy:
    """A started copy. `host` is valid once `done` has passed; `source` must live until then."""

    host: Tensor
    source: Tensor
    done: Any
    use: Use


class HostCopies:
    """Hand tensors to functions in the order they came, each in the target's memory.

    The order is kept, so sums have the same bits as if every tensor were copied and added at once.
    """

    def __init__(self, source: torch.device, target: torch.device) -> None:
        """Make the copying stream, if copies go from CUDA to the host.

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

        # The copy runs in the background. `use` follows when its buffer is needed again.
        host = self._buffer(tensor)
        self._waiting.append(_Copy(host, tensor, self._start(tensor, host), use))
        if len(self._waiting) == NUM_BUFFERS:  # this frees the buffer that the next copy takes
            self._use_oldest()

    def drain(self) -> None:
        """Use everything that is waiting."""
        while self._waiting:
            self._use_oldest()

    def forget(self) -> None:
        """Drop what is waiting, unused. It waits for the copies, since they still write to the buffers."""
        for copy in self._waiting:
            copy.done.synchronize()
        self._waiting.clear()

    def _buffer(self, tensor: Tensor) -> Tensor:
        """Return the next pinned buffer as tensor's dtype and length. It grows to the longest tensor so far."""
        number, num_bytes = self._num_copies % NUM_BUFFERS, tensor.numel() * tensor.element_size()
        self._num_copies += 1
        buffer = self._buffers[number]
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._buffers[number] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return buffer[:num_bytes].view(tensor.dtype)

    def _start(self, tensor: Tensor, host: Tensor) -> Any:
        """Begin the copy once tensor is computed; return the event of its end."""
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
