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


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["delta", "scale", "--help"], ["plan", "--help"]])
def test_help_and_version_need_no_torch(words: list[str]) -> None:
    """It takes a second or several to import, and they are asked for often."""
    code = f"""
import sys
from piece_ds.__main__ import main
try:
    main({words!r})
finally:
    print("late:", *sorted({{"torch", "transformers", "deepspeed"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "late:"
