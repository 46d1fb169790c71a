"""A launch imports on every rank what all runs need; what only some need comes when it is used."""

import subprocess
import sys

import pytest

from piece_ds.cli.commands import LAUNCHED

pytestmark = pytest.mark.heavy


def test_no_launched_command_imports_what_draws_or_scores() -> None:
    """Each of these takes a second, on every rank of every launch; rank 0 alone draws, at the end."""
    modules = [module for module, _ in LAUNCHED.values()]
    code = f"""
import sys
from importlib import import_module
for module in {modules!r}:
    import_module(module)
print("late:", *sorted({{"matplotlib", "rouge_score", "nltk", "sacrebleu", "gguf"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert run.stdout.splitlines()[-1] == "late:"  # DeepSpeed prints before
