"""Say what is compiled for each provider: sources, compiler arguments, and the digest that names a build."""

import hashlib
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from piece_ds.runtime.errors import UserError

PACKAGE = Path(__file__).resolve().parent
CSRC = PACKAGE.parent / "csrc"

# No -march: the instruction set is chosen at run time. No fused multiply-add: reference.py rounds every operation.
_CXX_ARGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-g0")
# torch's stable ABI of 2.10, so that one binary serves every later torch.
_STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
_NVCC_ARGS = ("-O3", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", _STABLE_ABI)


@dataclass(frozen=True)
class BuildSpec:
    """What a provider is compiled from and how.

    Attributes:
        name: first part of the library's name.
        folders: folders of csrc whose files are compiled or included.
        sources: files to compile, relative to csrc, as glob patterns.
        cxx_args, nvcc_args: arguments of the compilers.
    """

    name: str
    folders: tuple[str, ...]
    sources: tuple[str, ...]
    cxx_args: tuple[str, ...]
    nvcc_args: tuple[str, ...] = ()

    def source_files(self) -> list[Path]:
        """Return absolute paths of the files to compile, in a fixed order."""
        return [path for pattern in self.sources for path in sorted(CSRC.glob(pattern))]

    def library_name(self) -> str:
        """Return the name and a hash of sources, headers and arguments: what the library is, whatever compiled it."""
        files = [path for folder in self.folders for path in sorted((CSRC / folder).rglob("*")) if path.is_file()]
        parts = [*self.cxx_args, *self.nvcc_args]
        for path in files:
            parts += [str(path.relative_to(CSRC)), path.read_text(encoding="utf-8")]
        return f"{self.name}_{_digest(parts)}"


BUILD_SPECS = {
    "cpu": BuildSpec(
        "piece_ds_cpu",
        ("include", "bind", "cpu"),
        ("cpu/*.cpp", "bind/cpu.cpp"),
        (*_CXX_ARGS, _STABLE_ABI),
    ),
    "cuda": BuildSpec(
        "piece_ds_cuda",
        ("include", "bind", "cuda"),
        ("cuda/*.cu", "bind/cuda.cpp"),
        (*_CXX_ARGS, _STABLE_ABI, "-DUSE_CUDA"),
        _NVCC_ARGS,
    ),
}


def _digest(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def compiler_version() -> str:
    """Return command and version of the C++ compiler; empty if there is none that can say its version."""
    try:
        command = shlex.split(os.environ.get("CXX") or "c++")
        if not command or shutil.which(command[0]) is None:
            return ""
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True)
    except (ValueError, OSError):  # a quotation mark too many, a file that is no program
        return ""
    # torch asks the same question, and gives up where it fails.
    return f"{shlex.join(command)} {answer.stdout.partition(chr(10))[0]}" if answer.returncode == 0 else ""


def require_compiler() -> None:
    """Raise UserError if there is no C++ compiler."""
    if not compiler_version():
        named = os.environ.get("CXX") or "c++"
        raise UserError(
            f"piece_ds compiles its kernels on first use and found no C++ compiler {named!r} that works: install one "
            "(g++ of Debian and Ubuntu, gcc-c++ of Fedora), name one in CXX, or set PIECE_DS_BACKEND=reference for the "
            "slow pure torch kernels"
        )
