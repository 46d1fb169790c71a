"""Everything that examine() checks, cheapest first. Whatever goes wrong becomes a finding, never an exception."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from piece_ds.doctor.findings import BAD, GOOD, NOTE, Finding
from piece_ds.doctor.processes import run_self_test
from piece_ds.ops import backends
from piece_ds.ops.build_specs import compiler_version
from piece_ds.ops.extension import prebuilt
from piece_ds.runtime.cache import cache_folder
from piece_ds.runtime.compile_lock import abandoned_locks
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.versions import versions

# DeepSpeed's extensions that runs load: the optimizers that its file may name, and on a CPU its collectives.
_DEEPSPEED_EXTENSIONS = ("cpu_adam", "fused_adam", "deepspeed_shm_comm")
_LITTLE_SPACE = 1 << 30  # room for a compiled kernel, a mask and a delta of an 8B model


def examine(folder: str, num_ranks: int) -> Iterator[Finding]:
    """Check this machine; yield findings one by one.

    Args:
        folder: where runs would write.
        num_ranks: processes of the self-test.
    Cost: see run_self_test(); ops are compiled if they are not yet.
    """
    found = versions()
    yield Finding("versions", GOOD, ", ".join(f"{name} {value}" for name, value in found.items() if name != "device"))
    yield _gpus()
    served = list(_backends())
    yield from _programs(all(finding.status == GOOD for finding in served))
    yield from served
    yield _deepspeed_ops()
    yield _locks()
    temporary = tempfile.gettempdir()
    places = {"output": folder, "temporary files": temporary, "compiled kernels": _kernel_folder()}
    for what, place in places.items():
        yield _folder(f"folder for {what}", Path(place))
    yield from _model_folders()
    if any(finding.status == BAD for finding in served):
        # Every process of it would end with that message, as a run would.
        yield Finding("self-test", BAD, "not tried: piece_ds ops must load first (see above)")
    else:
        yield from run_self_test(num_ranks)


def _gpus() -> Finding:
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        return Finding("GPUs", NOTE, f"none ({built}): runs use the CPU")
    names = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    shown = ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in names)
    return Finding("GPUs", GOOD, f"{shown}; CUDA {torch.version.cuda}")


def _programs(is_served: bool) -> Iterator[Finding]:
    # Ops that load need no compiler: they came compiled, were compiled here before, or are those of torch alone.
    missing = NOTE if is_served else BAD
    compiler = compiler_version()
    without = "none: install g++, name one in CXX, or set PIECE_DS_BACKEND=reference"
    if prebuilt("cuda" if torch.cuda.is_available() else "cpu") is not None:
        without = "none: the kernels came compiled with the package"
    elif is_served:
        without = "none: the ops that runs would use here work without one"
    yield Finding("C++ compiler", GOOD if compiler else missing, compiler or without)
    has_ninja = bool(shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH')}"))
    yield Finding("ninja", GOOD if has_ninja else missing, "found" if has_ninja else "none: pip install ninja")
    nvcc = shutil.which("nvcc")
    if torch.cuda.is_available() or nvcc:
        version = _first_line([nvcc, "--version"], "release") if nvcc else "no nvcc: Triton can serve the GPU's ops"
        yield Finding("CUDA compiler", GOOD if nvcc else NOTE, version)


def _backends() -> Iterator[Finding]:
    """Yield each device's chosen provider of ops, as a run would load it. It is compiled if needed."""
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        works, found = _tried(lambda device=device: backends.load(device))  # type: ignore[misc]
        others = [name for name in backends.providers(device) if name != found]
        shown = f"{found} serves them; {backends.VARIABLE} may name {' or '.join(others)}" if works else found
        yield Finding(f"piece_ds ops on {device}", GOOD if works else BAD, shown)


def _deepspeed_ops() -> Finding:
    """Return whether DeepSpeed's CPU Adam, which offload needs, is compiled or can be."""

    def look() -> str:
        from deepspeed.ops.op_builder import CPUAdamBuilder

        builder = CPUAdamBuilder()
        if _is_built(builder):
            return "cpu_adam is compiled (optimizer offload)"
        if not compiler_version() or not builder.is_compatible(verbose=False):
            raise UserError("cpu_adam cannot be compiled here")
        return "cpu_adam can be compiled (optimizer offload)"

    works, found = _tried(look)
    return Finding("DeepSpeed's ops", GOOD if works else NOTE, found if works else f"{found}: no optimizer offload")


def _locks() -> Finding:
    """Return which compilations of torch's extensions were killed: runs that need one of them end, or wait for ever."""
    found = list(abandoned_locks(Path(_kernel_folder())))
    if not found:
        return Finding("compilations", GOOD, "none was left unfinished")
    is_needed = any(lock.parent.name in _DEEPSPEED_EXTENSIONS for lock, _ in found)
    shown = "; ".join(f"{lock} {reason}: remove it" for lock, reason in found)
    return Finding("compilations", BAD if is_needed else NOTE, shown)


def _is_built(builder: object) -> bool:
    return any(Path(_kernel_folder()).glob(f"**/{builder.NAME}.so"))  # type: ignore[attr-defined]


def _folder(what: str, place: Path) -> Finding:
    """Return whether a file can be written and read back in a folder, and how much space is free."""

    def look() -> str:
        # The folder may not exist yet: a run would make it.
        inside = next(parent for parent in (place, *place.absolute().parents) if parent.exists())
        with tempfile.TemporaryFile(dir=inside) as probe:
            probe.write(b"piece_ds")
            probe.seek(0)
            if probe.read() != b"piece_ds":
                raise UserError("what is written there reads back differently")
        return f"{place} ({shutil.disk_usage(inside).free / 1e9:.1f} GB free)"

    works, found = _tried(look)
    if not works:
        return Finding(what, BAD, f"{place} cannot be written: {found}")
    return Finding(what, NOTE if shutil.disk_usage(_existing(place)).free < _LITTLE_SPACE else GOOD, found)


def _model_folders() -> Iterator[Finding]:
    """Look at the folders that models are fetched to. A run on a folder of the user's own needs neither."""
    from huggingface_hub.constants import HF_HUB_CACHE

    places: tuple[tuple[str, str, Callable[[], str]], ...] = (
        ("the Hub's models", "HF_HOME", lambda: HF_HUB_CACHE),
        ("piece_ds' cache", "PIECE_DS_CACHE", lambda: str(cache_folder())),
    )
    for what, variable, find in places:
        works, place = _tried(find)
        found = _folder(f"folder for {what}", Path(place)) if works else Finding(f"folder for {what}", BAD, place)
        is_bad = found.status == BAD
        yield Finding(found.what, NOTE, f"{found.found}; name another in {variable}") if is_bad else found


def _existing(place: Path) -> Path:
    return next(parent for parent in (place, *place.absolute().parents) if parent.exists())


def _kernel_folder() -> str:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return root or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "torch_extensions")


def _tried(function: Callable[[], str]) -> tuple[bool, str]:
    try:
        return True, function()
    except UserError as error:
        return False, " ".join(str(error).split())
    except Exception as error:  # any failure is a finding
        return False, " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _first_line(command: list[str], containing: str) -> str:
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return next((line.strip() for line in lines if containing in line), "found")
