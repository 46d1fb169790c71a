"""Keep torch to one thread, so that sums have one order; share the tests out among pytest-xdist's workers."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.garbage import freeze_imports

# The environment's own ninja, also where it is not activated: versions of ninja undo each other's builds.
os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
torch.set_num_threads(1)
gc.disable()  # until all is imported: a sixth of that time is collections, which find nothing

# A job that several files read runs once, so these files go to one worker.
_TOGETHER = {
    "distributed": ("test_compact_update.py", "test_masked_update.py"),
    "statistics": ("test_ranks.py", "test_statistics.py"),
    "streams": ("test_launchers.py", "test_resume.py", "test_stream.py", "test_variants.py"),
}


def pytest_collection_finish() -> None:
    """Leave what imports and collection made out of all further collections of garbage: engines ask for many."""
    freeze_imports()
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file, and of files that share a job, on one worker of `pytest -n`."""
    from xdist.scheduler import LoadScopeScheduling

    class ByJob(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            folder, _, name = path.rpartition("/")
            shared = [group for group, names in _TOGETHER.items() if name in names and not folder.endswith("unit")]
            return shared[0] if shared else path

    return ByJob(config, log)
