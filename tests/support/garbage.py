"""Collections of garbage that leave out what imports have made, and no garbage with it."""

import gc

from piece_ds.runtime import garbage


def freeze_imports() -> None:
    """Collect once, then leave everything that is there out of all further collections, here and in forks."""
    gc.collect()
    garbage.freeze_imports()
