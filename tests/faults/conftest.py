"""Jobs that stop, kill and resume whole streams; each pays for the imports once and forks its ranks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import TESTS
from support.launches import environment

Outcome = dict[str, Any]


def run_faults(module: str, folder: Path, *arguments: str, seconds: float = 1800) -> Outcome:
    """Run a job of tests/support that writes FOLDER/outcome.json, and return that."""
    variables = {**environment(), "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    command = [sys.executable, "-m", f"support.{module}", str(folder), *arguments]
    run = subprocess.run(command, env=variables, cwd=folder, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, f"{run.stdout[-3000:]}\n{run.stderr[-5000:]}"
    return json.loads((folder / "outcome.json").read_text())


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """faults(case, ...) -> what the cases of support.fault_job came to; the same cases run once a session."""
    done: dict[tuple[str, ...], Outcome] = {}

    def outcome(*cases: str) -> Outcome:
        if cases not in done:
            done[cases] = run_faults("fault_job", tmp_path_factory.mktemp("faults"), *cases)
        return done[cases]

    return outcome
