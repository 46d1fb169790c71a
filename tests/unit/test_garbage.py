"""What imports have made is not looked through again; what a run makes is."""

import gc
import subprocess
import sys
import weakref

import pytest

from piece_ds.runtime.garbage import freeze_imports, no_collections


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


def test_collections_wait_for_the_end_of_the_imports() -> None:
    """Or for the start of the run, if that comes first; a process that collects nothing itself goes on so."""

    def fail() -> None:
        with no_collections():
            assert not gc.isenabled()
            with no_collections():
                pass
            assert not gc.isenabled()
            raise ValueError("an import")

    with pytest.raises(ValueError, match="an import"):
        fail()
    assert gc.isenabled()
    with no_collections():
        freeze_imports()
        assert gc.isenabled()
    gc.disable()
    try:
        with no_collections():
            freeze_imports()
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("words", [["train", "--help"], ["plan", "--help"]])
def test_a_command_imports_without_a_collection(words: list[str]) -> None:
    code = f"""
import atexit, gc, sys
events = []
gc.callbacks.append(lambda phase, info: events.append(phase))
atexit.register(lambda: print(len(events), file=sys.stderr))
from piece_ds.__main__ import main
main({words!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0
    assert run.stdout
    assert int(run.stderr.splitlines()[-1]) < 30
