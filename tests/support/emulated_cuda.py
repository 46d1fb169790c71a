"""csrc/cuda and its binding, compiled for the CPU with cuda_emulator.h as ops of the namespace piece_ds_emulated.

The sources are used as they are but for what C++ cannot read: a launch `kernel<<<configuration>>>(arguments)` becomes
a call, dynamic shared memory a pointer, and the binding is registered for CPU tensors. Misaligned accesses and other
undefined behaviour end the process (-fsanitize=undefined).
"""

import os
import re
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from piece_ds.ops.build_specs import BUILD_SPECS, CSRC, _digest, compiler_version
from piece_ds.ops.extension import _cache_folder
from piece_ds.ops.schema import SCHEMAS
from piece_ds.runtime.cache import locked

NAMESPACE = "piece_ds_emulated"
SUPPORT = Path(__file__).parent
HEADERS = ("cuda_runtime_api.h", "cooperative_groups.h", "cub/block/block_scan.cuh", "cub/block/block_reduce.cuh")
SANITIZE = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]

BINDING = {
    "STABLE_TORCH_LIBRARY_IMPL(piece_ds, CUDA, m)": f"STABLE_TORCH_LIBRARY_IMPL({NAMESPACE}, CPU, m)",
    "tensor.is_cuda()": "tensor.is_cpu()",
    "first.is_cuda()": "first.is_cpu()",
    "torch::stable::accelerator::DeviceGuard guard_;": "int32_t guard_;",
    "aoti_torch_get_current_cuda_stream(index_, &stream)": "0",
}


def plain_launches(source: str) -> str:
    """source with every `kernel<<<configuration>>>(arguments)` as a call of the emulator."""
    while "<<<" in source:
        opening = source.index("<<<")
        begin = max(source.rindex(mark, 0, opening) for mark in ";{}" if mark in source[:opening]) + 1
        closing = source.index(">>>(", opening)
        depth, end = 1, closing + 4
        while depth:
            depth += {"(": 1, ")": -1}.get(source[end], 0)
            end += 1
        kernel, configuration = source[begin:opening].strip(), source[opening + 3 : closing]
        call = f"emulator::launch({configuration}, [&] {{ {kernel}({source[closing + 4 : end - 1]}); }})"
        source = f"{source[:begin]} {call}{source[end:]}"
    return source


def rewritten(path: Path) -> str:
    """The text that is compiled in place of csrc's file."""
    text = plain_launches(path.read_text(encoding="utf-8"))
    for name, replacement in BINDING.items() if path.name == "cuda.cpp" else ():
        assert name in text, f"{path.name} no longer says {name}"
        text = text.replace(name, replacement)
    shared = "reinterpret_cast<uint32_t*>(emulator::dynamic_shared.data())"
    return re.sub(r"extern __shared__ uint32_t (\w+)\[\];", rf"uint32_t* \1 = {shared};", text)


def sources(folder: Path) -> list[Path]:
    """Write what is compiled into folder, which is empty; return its files."""
    for header in HEADERS:
        path = folder / "include" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#include "cuda_emulator.h"\n')
    for path in [*CSRC.glob("cuda/*"), *CSRC.glob("bind/*.h"), CSRC / "bind" / "cuda.cpp"]:
        target = folder / path.parent.name / path.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(rewritten(path) if path.suffix in (".cu", ".cpp") else path.read_text(encoding="utf-8"))
    return [*sorted(folder.glob("cuda/*.cu")), folder / "bind" / "cuda.cpp"]


def arguments() -> list[str]:
    """The compiler and its arguments, but for what names the folder of the sources."""
    torch_folder = Path(torch.__file__).parent
    found = ["c++", *BUILD_SPECS["cuda"].cxx_args, "-O1", "-std=c++17", "-fPIC", "-fvisibility=default", *SANITIZE]
    found += [f"-I{SUPPORT}", f"-I{CSRC / 'include'}", "-DTORCH_EXTENSION_NAME=emulated"]
    return [*found, "-isystem", str(torch_folder / "include"), "-isystem", sysconfig.get_paths()["include"], "-w"]


def library() -> Path:
    """The library of these very sources, from the folder of compiled extensions; built there if it is not in it."""
    with TemporaryDirectory(dir=_cache_folder()) as name:
        folder = Path(name)
        files = sources(folder)
        headers = [SUPPORT / "cuda_emulator.h", *(CSRC / "include").rglob("*.h")]
        compiled = [path.read_text(encoding="utf-8") for path in [*sorted(folder.rglob("*.*")), *sorted(headers)]]
        flags = [argument for argument in arguments() if not argument.startswith("-I")]  # of any checkout
        digest = _digest([*flags, torch.__version__, compiler_version(), *compiled])
        path = _cache_folder() / f"emulated_{digest}.so"
        with locked(path):
            if not path.exists():
                os.replace(build(folder, files), path)
        return path


def build(folder: Path, files: list[Path]) -> Path:
    """Compile the files in folder into a library there."""

    def compile_one(source: Path) -> Path:
        command = [*arguments(), f"-I{folder / 'include'}", "-x", "c++", "-c", str(source)]
        run([*command, "-o", str(source.with_suffix(".o"))])
        return source.with_suffix(".o")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_one, files)]
    torch_folder = Path(torch.__file__).parent
    built = folder / "emulated.so"
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run(["c++", "-shared", *SANITIZE, *objects, *libraries, f"-Wl,-rpath,{torch_folder / 'lib'}", "-o", str(built)])
    return built


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def load() -> dict[str, Callable[..., Any]]:
    """Op name -> function on CPU tensors that runs the emulated CUDA kernels."""
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.ops.load_library(str(library()))
    return {name: getattr(getattr(torch.ops, NAMESPACE), name).default for name in SCHEMAS}
