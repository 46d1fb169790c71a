"""Batches come in order and ahead of time; gradients reach the host in order and never before their copy is done."""

from typing import Any

import torch
from torch import Tensor

from piece_ds.zero.batch_feed import BatchFeed
from piece_ds.zero.host_copies import NUM_BUFFERS, HostCopies

CPU = torch.device("cpu")


class Source:
    """Micro-batches that note when they are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return 9

    def __getitem__(self, b: int) -> dict[str, Tensor]:
        self.read.append(b)
        return {"x": torch.tensor([b])}


def test_batches_come_in_the_order_asked_for_and_each_is_read_once() -> None:
    source = Source()
    feed = BatchFeed(source, [4, 0, 0, 7], CPU)
    got = []
    for number in range(4):
        got.append(int(feed.take()["x"]))
        feed.read_ahead()
        feed.read_ahead()
        assert len(source.read) == min(number + 2, 4)
    assert got == source.read == [4, 0, 0, 7]


def test_without_reading_ahead_the_order_is_the_same() -> None:
    feed = BatchFeed(Source(), [2, 1], CPU)
    assert [int(feed.take()["x"]) for _ in range(2)] == [2, 1]


def test_on_one_device_a_tensor_is_used_at_once() -> None:
    copies, used = HostCopies(CPU, CPU), []
    copies.put(torch.ones(2), used.append)
    assert len(used) == 1


class SlowCopies(HostCopies):
    """Copies as a device makes them: the host's buffer is written only when somebody waits for the event."""

    def __init__(self) -> None:
        super().__init__(CPU, CPU)
        self._is_needed = True

    def _buffer(self, tensor: Tensor) -> Tensor:
        number = self._num_copies % NUM_BUFFERS
        self._num_copies += 1
        if self._buffers[number] is None:
            self._buffers[number] = torch.full((8,), -1.0)
        return self._buffers[number][: tensor.numel()]

    def _start(self, tensor: Tensor, host: Tensor) -> Any:
        class Event:
            def synchronize(self) -> None:
                host.copy_(tensor)

        return Event()


def test_gradients_are_used_in_order_each_after_its_copy_and_before_its_buffer_is_written_again() -> None:
    copies, used, places = SlowCopies(), [], set()
    sent = [torch.full((1 + i % 5,), float(i)) for i in range(11)]
    for number, tensor in enumerate(sent):
        copies.put(tensor, lambda host: (used.append(host.clone()), places.add(host.data_ptr())))
        assert len(used) >= number  # one may be under way
    copies.drain()
    assert len(used) == len(sent)
    assert all(torch.equal(a, b) for a, b in zip(used, sent, strict=True))
    assert places == {buffer.data_ptr() for buffer in copies._buffers}  # in the host's memory, not where they came from


def test_what_is_forgotten_is_not_used() -> None:
    copies, used = SlowCopies(), []
    copies.put(torch.ones(3), used.append)
    copies.forget()
    copies.drain()
    assert used == []
