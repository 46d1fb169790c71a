"""Jobs that stop, kill and resume whole streams; each forks its ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import run_alone

Outcome = dict[str, Any]


def run_faults(module: str, folder: Path, *arguments: str, seconds: float = 1800) -> Outcome:
    """Run a job of tests/support that writes FOLDER/outcome.json, and return that."""
    run_alone(f"support.{module}", folder, *arguments, seconds=seconds)
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
