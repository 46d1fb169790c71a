"""Collections of garbage that leave out what imports have made: every engine and every Trainer asks for some."""

import atexit
import gc


def freeze_imports() -> None:
    """Leave everything that is there now out of all further collections, in this process and its forks.

    Half a million objects of torch and its friends take 0.3 to 0.9 s each time, and a task asks about four times.
    """
    gc.freeze()
    # Else Triton's bindings tell at the end of the process of all that was never freed.
    atexit.register(gc.unfreeze)
