"""Adapt DeepSpeed's op builders to the compiled providers. extension.py decides what is compiled, they do it.

setup.py also compiles ahead of time with them. Imported only to build, since DeepSpeed is slow to import.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.utils.cpp_extension
from deepspeed.ops.op_builder.builder import (
    CUDAMismatchException,
    CUDAOpBuilder,
    MissingCUDAException,
    assert_no_cuda_mismatch,
)
from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

from piece_ds.ops.build_specs import BUILD_SPECS, CSRC, BuildSpec, require_compiler
from piece_ds.runtime.environment import environment_kept
from piece_ds.runtime.errors import UserError


class _PieceBuilder:
    """What both builders share; mixed in before DeepSpeed's class.

    DeepSpeed keys loaded ops by name, and looks installed ones up in a table of its own. So names carry our prefix and
    a hash, and building goes through compile_in() instead of load().

    Attributes:
        recipe: what is compiled.
        device_type: 'cpu' or 'cuda'.
        name: of the library.
        instead: setting that serves if nothing can be compiled.
    """

    recipe: BuildSpec
    device_type: str
    name: str
    instead: str  # setting that serves if nothing can be compiled

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name or self.recipe.library_name())  # type: ignore[call-arg]

    def absolute_name(self) -> str:
        return f"piece_ds.ops.{self.name}"

    def sources(self) -> list[str]:
        return [str(path) for path in self.recipe.source_files()]

    def include_paths(self) -> list[str]:
        return [str(CSRC / "include")]

    def cxx_args(self) -> list[str]:
        return list(self.recipe.cxx_args)

    def libraries_args(self) -> list[str]:
        return []

    def compile_in(self, folder: Path) -> None:
        """Build under folder, which no other process uses, and load the result.

        Raises:
            UserError: a compiler is missing or fails.
        """
        require_compiler()
        try:
            with _environment(folder):
                self.check_toolkit()
                self.jit_load(verbose=False)  # type: ignore[attr-defined]
        except (
            RuntimeError,
            OSError,
            subprocess.SubprocessError,
            MissingCUDAException,
            CUDAMismatchException,
        ) as error:
            # A compiler's output is long: one line for the user, all of it in a file.
            log = folder.parent / f"{self.name}.log"
            log.write_text(str(error), encoding="utf-8")
            raise UserError(
                f"the piece_ds {self.device_type} kernels could not be compiled: {_first_error(str(error))} (all of it "
                f"in {log}); repair that, or set {self.instead}"
            ) from error

    def check_toolkit(self) -> None:
        """Raise what DeepSpeed raises if the toolkit does not fit."""


class PieceCPUBuilder(_PieceBuilder, CPUOpBuilder):
    """Builder of the C++ provider; no argument depends on the machine that compiles."""

    recipe = BUILD_SPECS["cpu"]
    device_type = "cpu"
    instead = "PIECE_DS_BACKEND=reference for the slow pure torch kernels"


class PieceCUDABuilder(_PieceBuilder, CUDAOpBuilder):
    """Builder of the CUDA provider.

    It replaces DeepSpeed's own arguments: their --use_fast_math flushes denormals and approximates.
    """

    recipe = BUILD_SPECS["cuda"]
    device_type = "cuda"
    instead = "PIECE_DS_BACKEND=triton for kernels that need no compiler"

    def nvcc_args(self) -> list[str]:
        return [*self.recipe.nvcc_args, *self.compute_capability_args()]

    def check_toolkit(self) -> None:
        use_toolkit_of_nvcc()
        assert_no_cuda_mismatch(self.name)


def toolkit_of_nvcc() -> str | None:
    """Return the folder of the toolkit that nvcc belongs to, as it says itself; None if no nvcc is on the path.

    The nvcc on the path may be a wrapper in another folder, without headers beside it.
    """
    if shutil.which("nvcc") is None:
        return None
    described = subprocess.run(["nvcc", "-v", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", described.stdout + described.stderr, re.MULTILINE)
    return os.path.realpath(found.group(1).strip()) if found else None


def use_toolkit_of_nvcc() -> None:
    """Make torch and DeepSpeed compile with the toolkit that nvcc belongs to, unless CUDA_HOME names another.

    torch looks at `which nvcc` once, when its module of builders is imported.
    """
    # The user's own choice stands.
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return
    folder = toolkit_of_nvcc()
    if folder is not None:
        torch.utils.cpp_extension.CUDA_HOME = folder


def _first_error(text: str) -> str:
    """Return the first line of a compiler's output that says what is wrong, or the first line of anything else."""
    lines = text.splitlines() or ["no message"]
    return next((line for line in lines if " error: " in line), lines[0])


BUILDERS: dict[str, Any] = {"cpu": PieceCPUBuilder, "cuda": PieceCUDABuilder}


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """Make torch build under folder, with the ninja that is installed beside this Python."""
    # Both variables are the process's.
    with environment_kept("TORCH_EXTENSIONS_DIR", "PATH"):
        os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        yield
