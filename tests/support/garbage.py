"""Collections of garbage that leave out what imports have made: DeepSpeed asks for one with every engine."""

import atexit
import gc


def freeze_imports() -> None:
    """Leave everything that is there now out of all further collections, in this process and its forks.

    Half a million objects of torch and its friends take 0.3 s each time.
    """
    gc.collect()
    gc.freeze()
    # Else Triton's bindings tell at the end of the process of all that was never freed.
    atexit.register(gc.unfreeze)
