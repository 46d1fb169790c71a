"""Follow a chain of deltas: apply each new link to a live model as soon as its file is there.

    follower = ChainFollower(model, "runs/mine/00-law")
    for link in follower.follow(seconds=3600):
        print(link.step, follower.apply_ms)

A wrong base, a missing, repeated or damaged link, and weights that something else has changed are refused before a
weight is written; the model then is what the last applied link left.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from piece_ds.deltas.chain import Link, open_link, require_follows
from piece_ds.deltas.chain_files import chain_folders, link_files
from piece_ds.deltas.live import LiveDelta
from piece_ds.deltas.live_fingerprint import live_fingerprint, move_of
from piece_ds.runtime.distributed import broadcast_object
from piece_ds.runtime.errors import UserError


class ChainFollower:
    """A live model and the chain that it follows.

    Attributes:
        model: the model.
        fingerprint: of all its weights now.
        last: the link that it stands at; None at the chain's start.
        apply_ms: milliseconds that the last link took, from opening its file to the last write.
    """

    def __init__(self, model: nn.Module, source: Path | str, *, check_weights: bool = True) -> None:
        """Find where on the chain the model stands: at its start, or at the end of any link.

        Args:
            model: on any device, whole, partitioned by ZeRO-3 or of DTensors. With several ranks, all make a follower,
                and call it together; each reads the files.
            source: a folder of links, a task's folder, or a run's. Links need not be there yet.
            check_weights: compare fingerprints. Pass False for a model in another dtype than the chain's: then it must
                stand at the chain's start, and only the links are compared with each other.
        Raises:
            UserError: the first links are damaged.
        Cost: reads all weights once.
        """
        self.model, self._source, self._check = model, Path(source), check_weights
        self.fingerprint = live_fingerprint(model) if check_weights else None
        self.last: Link | None = None
        self.apply_ms = 0.0
        self._is_placed = False

    def apply_new(self) -> list[Link]:
        """Apply every link that is there and not applied yet; return them. A collective.

        Raises:
            UserError: see the module.
        """
        paths = broadcast_object(self._paths())
        applied = []
        for path in paths[self._place(paths) :]:
            self._apply(path)
            assert self.last is not None
            applied.append(self.last)
        return applied

    def follow(self, seconds: float = float("inf"), poll_seconds: float = 0.05) -> Iterator[Link]:
        """Yield each link after it has been applied, until no new one has come for some time. A collective.

        Args:
            seconds: how long to wait for a new link.
            poll_seconds: how often to look.
        """
        waiting_since = time.monotonic()
        while True:
            for link in self.apply_new():
                yield link
                waiting_since = time.monotonic()
            # Clocks differ between ranks: one decides for all.
            if broadcast_object(time.monotonic() - waiting_since >= seconds):
                return
            time.sleep(poll_seconds)

    def _paths(self) -> list[Path]:
        return [path for folder in chain_folders(self._source) for path in link_files(folder)]

    def _place(self, paths: list[Path]) -> int:
        """Return how many of the links the model has; on the first call, find out by its fingerprint.

        Raise UserError if the model stands nowhere on the chain, or a link that it had is gone.
        """
        if self._is_placed:
            if self.last is None:
                return 0
            if self.last.path not in paths:
                raise UserError(f"{self.last.path} is not there any more: the chain cannot be followed on")
            return paths.index(self.last.path) + 1
        if not paths:
            return 0

        # The start, or where an earlier follower has ended.
        before: Link | None = None
        for number, path in enumerate(paths):
            link = open_link(path)
            if self.fingerprint in (None, link.base):
                self._is_placed, self.last = True, before
                return number
            before = link
        assert before is not None
        if self.fingerprint == before.result:
            self._is_placed, self.last = True, before
            return len(paths)
        raise UserError(
            f"this model's weights ({self.fingerprint}) are neither those that {paths[0].parent} starts from nor those "
            "that one of its links ends at: give the base that the run began with, in the same dtype"
        )

    @torch.no_grad()
    def _apply(self, path: Path) -> None:
        """Check one link against the last one and against the weights, and write it."""
        begin = time.perf_counter()
        link = open_link(path)
        if self.last is not None or self.fingerprint is None:
            require_follows(link, self.last)
        live = LiveDelta.of(self.model, link.delta)
        if self.fingerprint is not None:
            # What the link would move must lead from its base to its result: then the weights under it are its base's.
            expected = (int(link.result, 16) - int(link.base, 16)) % 2**64
            if self.fingerprint != link.base or move_of(live) != expected:
                raise UserError(
                    f"{path} goes on weights {link.base}, which this model does not hold (it should stand at "
                    f"{self.fingerprint}): another base, or something else has changed the model; load it again"
                )
            self.fingerprint = link.result
        live.set_()
        self.last = link
        self.apply_ms = 1000 * (time.perf_counter() - begin)
