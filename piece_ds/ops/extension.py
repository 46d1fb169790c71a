"""Provide a compiled provider as a library file: compiled ahead of time, found in the cache, or built once.

Files decide, not modules. A library's name holds a hash of everything that went into it, so an edited source or another
torch never meets an old binary. A process that builds holds a lock, which the operating system releases however that
process ends. It moves the finished library into place in one step.
"""

import fcntl
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from piece_ds.ops.build_specs import (
    BUILD_SPECS,
    CSRC,
    PACKAGE,
    _digest,
    compiler_version,
    require_compiler,
)
from piece_ds.runtime.cache import user_cache
from piece_ds.runtime.errors import UserError

logger = logging.getLogger(__name__)


def load_extension(device_type: str) -> Path:
    """Load the compiled provider of device_type ('cpu', 'cuda'), which registers its ops; return its library's file.

    In this order: compiled with the package (PIECE_DS_BUILD_OPS=1), in the cache, built now.

    Raises:
        UserError: it must be built and cannot be on this machine.
    Cost: some milliseconds. If it must be built, seconds (CPU) or minutes (CUDA), in one process of the machine.
    """
    # Compiled with the package.
    recipe = BUILD_SPECS[device_type]
    if not recipe.source_files():
        raise UserError(f"no sources of the {device_type} kernels under {CSRC}: install piece_ds from a whole checkout")
    name, path = recipe.library_name(), prebuilt(device_type)
    if path is not None:
        return _import(name, path)

    # In the cache, under a name that also tells torch, machine and compiler.
    name = f"{name}_{_digest(_environment(device_type))}"
    folder = _cache_folder()
    compiler = compiler_version()
    if not compiler:  # a cluster's nodes may have none, and share the cache of one that does
        built_elsewhere = sorted(folder.glob(f"{name}_*.so"))
        if built_elsewhere:
            return _import(built_elsewhere[0].stem, built_elsewhere[0])
        require_compiler()
    name = f"{name}_{_digest([compiler])}"

    # Built once for the machine.
    path = folder / f"{name}.so"
    if not path.exists():
        with _locked(path.with_suffix(".lock")):
            if not path.exists():  # another process may have built it while this one waited
                return _build(device_type, name, path)
    return _import(name, path)


def prebuilt(device_type: str) -> Path | None:
    """Return the library that was compiled with the package from these very sources; None if there is none."""
    name = BUILD_SPECS[device_type].library_name()
    places = [PACKAGE / f"{name}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    return next((path for path in places if path.exists()), None)


def _environment(device_type: str) -> list[str]:
    """Return what a binary depends on besides its sources and its compiler."""
    parts = [torch.__version__, platform.machine(), sys.implementation.cache_tag or ""]
    if device_type == "cuda":
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        parts += [str(torch.version.cuda), os.environ.get("TORCH_CUDA_ARCH_LIST", ""), str(sorted(capabilities))]
    return parts


def _cache_folder() -> Path:
    """Return where torch keeps extensions, in a folder of our own."""
    # The same rule as torch's own, so that one variable moves both.
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not root:
        root = str(user_cache() / "torch_extensions")
    folder = Path(root) / "piece_ds"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot keep compiled kernels in {folder} ({error.strerror}): set TORCH_EXTENSIONS_DIR to a "
            "folder that can be written"
        ) from error
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among all processes of the machine. A process that dies releases it.

    The file stays: deleting it would let two processes in.
    """
    with open(path, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(device_type: str, name: str, path: Path) -> Path:
    """Compile in a folder of this process, load, and move the library to path."""
    from piece_ds.ops.builder import BUILDERS

    for leftover in path.parent.glob(f"{name}.build-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("compiling the piece_ds %s kernels, once for this machine", device_type)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}.build-", dir=path.parent))
    try:
        BUILDERS[device_type](name).compile_in(folder)
        os.replace(folder / name / f"{name}.so", path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return path


def _import(name: str, path: Path) -> Path:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return path
