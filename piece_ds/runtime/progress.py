"""The project's one progress bar: a bar on a terminal, one line per minute in a log, both only on rank 0."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized

from tqdm import tqdm

from piece_ds.runtime.distributed import is_main

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0


def progress_bar(items: Iterable, description: str, unit: str = "it", total: int | None = None) -> Iterable:
    """Return items, and show progress on rank 0 as they pass.

    On a terminal that is a bar. Otherwise it is a log line per minute, with the time left if the total is known.
    """
    if not is_main():
        return items
    if sys.stderr.isatty():
        return tqdm(items, desc=description, unit=unit, total=total, dynamic_ncols=True)
    return _with_lines(items, description, unit, total)


def _with_lines(items: Iterable, description: str, unit: str, total: int | None) -> Iterator:
    if total is None and isinstance(items, Sized):
        total = len(items)
    begin = said = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        # The first item is no measure of speed.
        if count and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            of, left = "", ""
            if total:
                of, left = f" of {total}", f", about {(now - begin) / count * (total - count) / 60:.1f} min left"
            logger.warning("%s: %d%s %s%s", description, count, of, _several(unit), left)
        yield item


def _several(unit: str) -> str:
    """Return the plural of a unit."""
    return unit + ("es" if unit.endswith(("ch", "s", "sh", "x")) else "s")
