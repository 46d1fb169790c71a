"""Timing on noisy, shared machines: every round runs all contestants and a copy, and ratios are paired.

A round takes at most about a second. So what slows the machine slows everything in the round, and the result is the
median of the ratio over rounds. Caches are flushed before each sample, as they are between two calls in training.
"""

import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # beyond every last-level cache
COPY_BYTES = 256 << 20


@dataclass
class Samples:
    """Milliseconds of one contestant, one per round."""

    ms: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        return float(torch.tensor(self.ms, dtype=torch.float64).quantile(q))

    def times_slower_than(self, other: "Samples") -> float:
        """Return the median of the ratios of the same rounds."""
        return statistics.median(a / b for a, b in zip(self.ms, other.ms, strict=True))


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self._source = torch.ones(COPY_BYTES // 4, device=device)
        self._target = torch.zeros_like(self._source)

    def rounds(
        self, contestants: dict[str, Callable[[], object]], prepare: Callable[[], object], num_rounds: int
    ) -> tuple[dict[str, Samples], Samples]:
        """Return the samples of each contestant, and GB/s of a copy in the same rounds.

        The first two rounds do not count. Each round begins with another contestant: the first call after the copy's
        own threads is up to 0.1 ms slower.
        """
        results = {name: Samples() for name in contestants}
        copies = Samples()
        for number in range(num_rounds + 2):
            copy_gbps = self.copy_gbps()
            first = number % len(contestants)
            names = [*contestants]
            for name in names[first:] + names[:first]:
                prepare()
                ms = self.ms(contestants[name])
                if number >= 2:
                    results[name].ms.append(ms)
            if number >= 2:
                copies.ms.append(statistics.mean((copy_gbps, self.copy_gbps())))
        return results, copies

    def ms(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call with cold caches."""
        self._flush.add_(1.0)
        if self.device != "cpu":
            self._flush.amax()  # leaves clean lines in the L2: the contestant must not pay for writing dirty ones back
        if self.device == "cpu":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def copy_gbps(self) -> float:
        """Return the bandwidth of the fastest known copy, in bytes read and written per nanosecond (GB/s)."""
        ms = self.ms(lambda: self._target.copy_(self._source))
        if self.device == "cpu":  # the C library's memcpy streams past the caches, torch's copy does not
            ms = min(ms, self.ms(lambda: _copy_on_all_threads(self._target, self._source)))
        return 2 * COPY_BYTES / ms / 1e6


def _copy_on_all_threads(target: Tensor, source: Tensor) -> None:
    num_threads = torch.get_num_threads()
    share = source.nbytes // num_threads
    threads = [
        threading.Thread(
            target=ctypes.memmove, args=(target.data_ptr() + i * share, source.data_ptr() + i * share, share)
        )
        for i in range(num_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
