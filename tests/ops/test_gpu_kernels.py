"""Every CUDA kernel equals the reference to the bit without a GPU: Triton's in its interpreter, C++ in an emulator.

That holds their logic: positions, heads and tails, alignment, bounds, barriers, scratch, prefixes. What only hardware
has, such as warps that take turns, is test_ops_cuda.py's.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from piece_ds.ops.schema import SCHEMAS

pytestmark = pytest.mark.heavy

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(
    scope="module",
    params=[
        "triton_job few",
        pytest.param("triton_job", marks=pytest.mark.slow),
        "emulation_job few",
        pytest.param("emulation_job", marks=pytest.mark.slow),
    ],
)
def outcome(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the job prints: op -> [number of cases, failures]."""
    name, *arguments = request.param.split()
    if name == "triton_job":
        pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(SUPPORT.parents[1]), str(SUPPORT)))}
    job = [sys.executable, str(SUPPORT / f"{name}.py"), *arguments]
    done = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("op", list(SCHEMAS))
def test_every_case_equals_the_reference(op: str, outcome: dict[str, Any]) -> None:
    number, failures = outcome[op]
    assert number >= 5
    assert not failures, f"{len(failures)} of {number}:\n" + "\n".join(failures[:5])
