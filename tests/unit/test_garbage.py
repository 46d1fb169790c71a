"""What imports have made is not looked through again; what a run makes is."""

import gc
import subprocess
import sys
import weakref

from piece_ds.runtime.garbage import freeze_imports


class Node:
    """An object that only a collection can free."""

    def __init__(self) -> None:
        self.itself = self


def test_later_cycles_are_still_freed() -> None:
    """Engines and models are cycles; a stream makes one after another."""
    freeze_imports()
    node = Node()
    gone = weakref.ref(node)
    del node
    gc.collect()
    assert gone() is None


def test_a_started_run_collects_without_its_imports() -> None:
    """A task asks for four collections; half a million objects of imports are in none of them."""
    code = """
import gc
import torch
from piece_ds.runtime.process import start_distributed, one_process_environment
one_process_environment()
start_distributed()
print(gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 20_000)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.stdout.split()[-2:] == ["True", "True"], run.stderr
    assert "leaked" not in run.stderr
