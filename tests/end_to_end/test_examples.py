"""Every script of examples/ runs as it stands, in a process of its own, and shows what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.launches import ROOT

from piece_ds.runtime.launch_environment import RANK_VARIABLES

# Script -> what its output must hold.
EXPECTED = {
    "trainer.py": "822 weights changed, 822 were selected",
    "plain_loop.py": "822 weights changed, 822 were selected",
    "compact.py": "the optimizer holds 822 values for a model of 82240 weights",
    "own_estimator.py": "trained with obd: loss ",
    "deltas.py": "the file is the first one again: True",
}

# Needs an environment of its own: unit/test_serve_vllm.py.
ELSEWHERE = {"serve_vllm.py"}


def run(script: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    for name in RANK_VARIABLES:
        environment.pop(name, None)
    command = [sys.executable, str(ROOT / "examples" / script), str(folder)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


def test_the_table_of_examples_has_every_script() -> None:
    scripts = {path.name for path in (ROOT / "examples").glob("*.py")} - {"small_model.py"}
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert scripts == set(EXPECTED) | ELSEWHERE
    assert all(f"| `{name}` |" in page for name in scripts)


def test_deltas_go_on_and_off_a_folder(tmp_path: Path) -> None:
    out = run("deltas.py", tmp_path)
    assert "served as trained: True" in out
    assert EXPECTED["deltas.py"] in out


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(set(EXPECTED) - {"deltas.py"}))
def test_an_example_runs(script: str, tmp_path: Path) -> None:
    assert EXPECTED[script] in run(script, tmp_path)
