"""What can be said of GPU code without a GPU: it compiles, spills nothing, and rounds as reference.py does.

Rounding is read off the PTX: IEEE square root and division, no approximation, no flushing of denormals, no fused
multiply-add. ptxas is free to fuse only where an instruction does not name its rounding; both compilers name it.
"""

import json
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import oldest_torch

from piece_ds.ops.build_specs import BUILD_SPECS, CSRC, _digest
from piece_ds.ops.extension import _cache_folder
from piece_ds.runtime.files import write_json

NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
INEXACT = re.compile(r"\.ftz|\.approx|div\.full|\bfma\.")
ARCHITECTURES = [80, pytest.param(90, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
# The Triton compiler is fast enough for all of them.
TRITON_ARCHITECTURES = [80, 90, 100]


def assert_exact(ptx: str, what: str) -> None:
    found = sorted(set(INEXACT.findall(ptx)))
    assert not found, f"{what}: {found}"


def compiled_cuda(source: Path, architecture: int, folder: Path) -> tuple[str, str]:
    """(PTX, what ptxas reports) of a .cu file; what an earlier run made of these very sources is taken."""
    version = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    sources = [source, *sorted((CSRC / "cuda").glob("*.h")), *sorted((CSRC / "include").rglob("*.h"))]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    parts = [version, str(architecture), *BUILD_SPECS["cuda"].nvcc_args, source.name, *texts]
    kept = _cache_folder() / f"ptx_{_digest(parts)}.json"
    if not kept.exists():
        write_json(kept, compile_cuda(source, architecture, folder))
    ptx, report = json.loads(kept.read_text(encoding="utf-8"))
    return ptx, report


def compile_cuda(source: Path, architecture: int, folder: Path) -> tuple[str, str]:
    """(PTX, what ptxas reports) of a .cu file."""
    arguments = [
        NVCC,
        *BUILD_SPECS["cuda"].nvcc_args,
        "-std=c++17",
        f"-I{CSRC / 'include'}",
        f"-arch=sm_{architecture}",
    ]
    arguments += ["-Xptxas", "-v", "-Werror", "all-warnings", "--keep", f"--keep-dir={folder}", "-cubin", str(source)]
    done = subprocess.run(
        [*arguments, "-o", str(folder / f"{source.stem}.cubin")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return (folder / f"{source.stem}.ptx").read_text(), done.stderr


@pytest.fixture(scope="module")
def cuda_code(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """File name -> (PTX, report), all files compiled at once."""
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = list(pool.map(lambda source: compiled_cuda(source, request.param, folder), SOURCES))
    return dict(zip((source.name for source in SOURCES), compiled, strict=True))


@needs_nvcc
@pytest.mark.parametrize("cuda_code", ARCHITECTURES, indirect=True, ids="sm_{}".format)
class TestCuda:
    def test_no_kernel_spills(self, cuda_code: dict[str, tuple[str, str]]) -> None:
        for name, (_, report) in cuda_code.items():
            frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
            assert frames, name
            assert set(frames) == {("0", "0", "0")}, f"{name}: {set(frames)}"

    def test_arithmetic_is_exact(self, cuda_code: dict[str, tuple[str, str]]) -> None:
        for name, (ptx, _) in cuda_code.items():
            assert_exact(ptx, name)
        for name in ("accumulate.cu", "score.cu", "histogram.cu", "compact.cu", "selected.cu"):
            assert "div.rn.f32" in cuda_code[name][0], name
            assert "sqrt.rn.f32" in cuda_code[name][0], name

    def test_memory_is_read_16_bytes_at_a_time(self, cuda_code: dict[str, tuple[str, str]]) -> None:
        wide = re.compile(r"ld\.global(\.nc)?\.(v4\.(u32|b32|f32)|v2\.(u64|b64|f64))")
        for name, (ptx, _) in cuda_code.items():
            if name != "selected.cu":  # which follows an index
                assert wide.search(ptx), name


def check_binding(binding: Path, torch_headers: Path) -> None:
    """Raise AssertionError unless binding compiles, without a warning, with torch's headers; not linked."""
    includes = [torch_headers, Path(sysconfig.get_paths()["include"])]
    if binding.stem == "cuda":
        if NVCC is None:
            pytest.skip("nvcc is not installed")
        described = subprocess.run([NVCC, "-E", "-v", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        includes.append(Path(re.findall("TOP=(.*)", described)[0].strip()) / "include")
    arguments = [*BUILD_SPECS[binding.stem].cxx_args, "-std=c++17", "-Wall", "-Wextra", "-fsyntax-only"]
    arguments += ["-DTORCH_EXTENSION_NAME=piece_ds", f"-I{CSRC / 'include'}"]
    for folder in includes:
        arguments += ["-isystem", str(folder)]
    done = subprocess.run(["c++", *arguments, str(binding)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_bindings_compile_against_the_stable_abi(name: str) -> None:
    """With the headers of any torch, also one without CUDA."""
    check_binding(CSRC / "bind" / f"{name}.cpp", Path(torch.__file__).parent / "include")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_bindings_compile_against_the_oldest_torch(name: str) -> None:
    headers = os.environ.get(oldest_torch.HEADERS_VARIABLE)
    if not headers:
        pytest.skip(f"set {oldest_torch.HEADERS_VARIABLE} to the headers of torch {oldest_torch.VERSION}")
    assert oldest_torch.includes_of_a_torch(Path(headers)) == oldest_torch.VERSION
    check_binding(CSRC / "bind" / f"{name}.cpp", Path(headers))


def test_bindings_use_no_name_that_the_oldest_torch_lacks() -> None:
    """Without its headers: names that came later are known."""
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={oldest_torch.VERSION}"' in pyproject, "the list of names is of another torch"
    for path in sorted((CSRC / "bind").iterdir()):
        assert not oldest_torch.names_too_new(path.read_text(encoding="utf-8")), path.name
    assert oldest_torch.names_too_new("a(STABLE_TORCH_ERROR_CODE_CHECK); // torch_from_blob") == [
        "STABLE_TORCH_ERROR_CODE_CHECK"
    ]


# ---- Triton ----

POINTERS = {
    **dict.fromkeys(("grad_ptr", "kept_ptr", "weight_ptr", "outputs_ptr", "inputs_ptr"), "*bf16"),
    **dict.fromkeys(("num_nonfinite_ptr", "candidate_index_ptr", "num_candidates_ptr", "counts_ptr"), "*i64"),
    **dict.fromkeys(("above_ptr", "ties_ptr", "before_ptr", "index_ptr", "begins_ptr", "addresses_ptr"), "*i64"),
    "words_ptr": "*i32",
    "partial_ptr": "*fp64",
}
INTEGERS = {
    **dict.fromkeys(("shift", "bits", "prefix", "num_steps", "key"), "i32"),
    **dict.fromkeys(("n_elements", "n_bytes", "offset", "capacity", "limit", "num_ties", "run", "stride"), "i64"),
    **dict.fromkeys(("num_sampled", "num_tokens", "num_inputs", "num_runs", "total"), "i64"),
}
CONSTANTS = {"WITH_SUM": True, "LEADING": False, "SAMPLING": False, "SCALED": True, "ENTRIES": 8, "TOKENS": 256}
CONSTANTS |= {"STEPS": 9, "WEIGHT_HOLDS_VALUE": True}
OUTPUT_OF_POSITIONS = ("_select_above_write_kernel",)


def signature_of(kernel, block: int) -> tuple[dict[str, str], dict[str, object], dict]:
    """(types, compile-time values, divisibility of pointers and lengths by 16) of a kernel's arguments."""
    types, constants, attributes = {}, {}, {}
    values = {**CONSTANTS, "BLOCK": block}
    for i, name in enumerate(kernel.arg_names):
        if name in values:
            types[name], constants[name] = "constexpr", values[name]
        elif name.endswith("_ptr"):
            is_position = name == "out_ptr" and kernel.fn.__name__ in OUTPUT_OF_POSITIONS
            types[name] = "*i64" if is_position else POINTERS.get(name, "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = INTEGERS.get(name, "fp32")
            if name in ("n_elements", "n_bytes", "num_tokens", "num_sampled"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def compile_triton(kernel, architecture: int, options: dict[str, object]) -> tuple[str, int]:
    """(PTX, bytes of local memory a thread needs, which is what it spills) of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from piece_ds.kernels.launch import BLOCK

    types, constants, attributes = signature_of(kernel, BLOCK)
    source = ASTSource(kernel, types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return compiled.asm["ptx"], compiled.asm["ptx"].count(".local ")


def triton_kernels() -> dict[str, object]:
    """Name -> kernel, of every file in kernels/."""
    from importlib import import_module

    files = [path.stem for path in (CSRC.parent / "kernels").glob("*.py")]
    modules = [import_module(f"piece_ds.kernels.{name}") for name in files]
    return {
        name: value for module in modules for name, value in vars(module).items() if re.fullmatch("_.*_kernel", name)
    }


@pytest.mark.parametrize("architecture", TRITON_ARCHITECTURES, ids="sm_{}".format)
def test_triton_kernels_compile_and_are_exact(architecture: int) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from piece_ds.kernels.launch import CHECKED_OPTIONS, OPTIONS

    kernels = triton_kernels()
    assert len(kernels) == 15
    for name, kernel in kernels.items():
        follows_index = "index_ptr" in kernel.arg_names and name != "_apply_mask_scatter_kernel"
        ptx, local = compile_triton(kernel, architecture, CHECKED_OPTIONS if follows_index else OPTIONS)
        assert_exact(ptx, name)
        assert local == 0, f"{name}: local memory"
        assert ("__assertfail" in ptx) == follows_index, f"{name}: positions are checked on the device"
        if {"lam", "beta2"} & set(kernel.arg_names):
            assert "div.rn.f32" in ptx, name
            assert "sqrt.rn.f32" in ptx, name
        if not follows_index:
            assert re.search(r"ld\.global(\.\w+)*\.(v4\.b32|v2\.b64)", ptx), f"{name}: narrow loads"


# Numbers that change from call to call, or from parameter to parameter, and make no code faster.
NOT_SPECIALIZED = {"offset", "capacity", "limit", "num_ties", "key", "num_runs", "total"}


def test_triton_compiles_no_kernel_again_for_another_number() -> None:
    """Triton makes a variant for every number that is 1 or a multiple of 16, unless it is told not to."""
    pytest.importorskip("triton", reason="Triton is not installed")
    for name, kernel in triton_kernels().items():
        special = {kernel.params[i].name for i in range(len(kernel.params)) if not kernel.params[i].do_not_specialize}
        assert not NOT_SPECIALIZED & special, name
