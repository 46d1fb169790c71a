"""Every test of what an op computes runs with every provider that this machine has for the CPU."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from support.op_cases import INSTRUCTION_SETS

from piece_ds import ops
from piece_ds.ops import backends
from piece_ds.ops.extension import load_extension
from piece_ds.runtime.errors import UserError


@pytest.fixture(scope="module", params=[*INSTRUCTION_SETS, "reference"])
def cpu_provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Serve the ops on the CPU by the provider of this name while the module's tests run."""
    assert ops.load("cpu") == "cpp", "these tests choose the provider themselves: unset PIECE_DS_BACKEND"
    if request.param == "reference":
        library = torch.library.Library("piece_ds", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the kernels of C++ are overridden is the point
            for name in ops.schema.SCHEMAS:
                library.impl(name, getattr(ops.reference, name), "CPU", allow_override=True)
        yield "reference"
        library._destroy()
        return
    library_file = load_extension("cpu")
    try:
        backends.select_isa(library_file, request.param)
    except UserError:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    backends.select_isa(library_file, "")
