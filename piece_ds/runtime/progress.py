"""One progress bar for the project: a bar on a terminal, a line a minute in a log, both on rank 0."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized

from tqdm import tqdm

from piece_ds.runtime.distributed import is_main

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 60.0


def progress_bar(items: Iterable, description: str, unit: str = "it", total: int | None = None) -> Iterable:
    """Return items; as they pass, rank 0 shows a bar on a terminal, else a line now and then with the time left."""
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
        if count and now - said >= SECONDS_BETWEEN_LINES:
            said = now
            of, left = "", ""
            if total:
                of, left = f" of {total}", f", about {(now - begin) / count * (total - count) / 60:.1f} min left"
            logger.warning("%s: %d%s %ss%s", description, count, of, unit, left)
        yield item
