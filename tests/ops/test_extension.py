"""The compiled provider is built once, whoever asks, survives a killed build, and never gives way in silence."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.builder import CUDAMismatchException, MissingCUDAException
from support.fresh_python import FreshPython, Server

from piece_ds.ops import backends, build_specs, extension
from piece_ds.ops.builder import BUILDERS
from piece_ds.runtime.errors import UserError

pytestmark = pytest.mark.heavy

# The compiler of this machine, before a library that some test imports has named one.
COMPILER = os.environ.get("CXX", "")
SHOW = "from piece_ds import ops; print(ops.load('cpu'))"
Start = Callable[..., FreshPython]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """(code, variables) -> a process of Python that has imported nothing of piece_ds."""
    server = Server(tmp_path_factory.mktemp("processes"))

    def start(code: str, without: tuple[str, ...] = (), **variables: str) -> FreshPython:
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CXX": COMPILER, **variables}
        for name in ("PIECE_DS_BACKEND", "PIECE_DS_ISA", "CXX"):
            if not environment.get(name):
                environment.pop(name, None)
        return server.start(code, environment, without)

    yield start
    server.close()


def result(process: FreshPython) -> str:
    code, out, err = process.wait()
    assert code == 0, err
    return out.strip()


def fails(process: FreshPython) -> str:
    code, _, err = process.wait()
    assert code != 0
    return err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler that does not optimise: what is tested here does not depend on it, and takes half the time."""
    path = tmp_path_factory.mktemp("compiler") / "quick-c++"
    path.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, python: Start, compiler: str) -> Path:
    """A cache in which two processes wanted the library at once, after a first one was killed while it built.

    The killed one has left what the worst moment leaves: its lock file, torch's own lock file, half an object.
    """
    cache = tmp_path_factory.mktemp("extensions")
    first = python(SHOW, TORCH_EXTENSIONS_DIR=str(cache), CXX=compiler)
    deadline = time.monotonic() + 120
    while not list(cache.glob("piece_ds/*.build-*/*/lock")):
        assert first.is_running(), "built before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert list(cache.glob("piece_ds/*.lock"))
    assert list(cache.glob("piece_ds/*.build-*/*/lock"))
    both = [python(SHOW, TORCH_EXTENSIONS_DIR=str(cache), CXX=compiler) for _ in range(2)]
    assert [result(process) for process in both] == ["cpp"] * 2
    return cache


def test_ranks_that_start_together_build_one_library_also_after_a_killed_build(built: Path) -> None:
    assert len(list(built.glob("piece_ds/*.so"))) == 1
    assert not list(built.glob("piece_ds/*.build-*"))


@pytest.mark.parametrize(("isa", "found"), [("", True), ("scalar", False)])
def test_a_built_library_is_taken_without_deepspeed_and_without_a_compile(
    built: Path, python: Start, compiler: str, isa: str, found: bool
) -> None:
    """Also with the instruction set that is named, and on a machine without the compiler that built it."""
    before = next(built.glob("piece_ds/*.so")).stat().st_mtime_ns
    code = "import logging; logging.basicConfig(level=20, format='%(message)s', force=True); "
    code += f"{SHOW}; import sys; print('deepspeed' in sys.modules)"
    variables = {"TORCH_EXTENSIONS_DIR": str(built), "PIECE_DS_ISA": isa}
    variables["CXX"] = compiler if found else "no-such-compiler"
    _, out, err = python(code, ("deepspeed",), **variables).wait()
    assert out.split() == ["cpp", "False"], err
    assert f"piece_ds ops on cpu: cpp, {isa}" in err
    assert next(built.glob("piece_ds/*.so")).stat().st_mtime_ns == before


def test_the_library_needs_only_torch_functions_of_the_stable_abi(built: Path) -> None:
    """Then one binary serves every later torch."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm, of binutils")
    library = str(next(built.glob("piece_ds/*.so")))
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True)
    names = [line.split(maxsplit=1)[1] for line in symbols.stdout.splitlines()]
    assert [name for name in names if "torch" in name]
    assert not [name for name in names if name.startswith(("at::", "c10::", "torch::"))]


def test_what_hinders_is_named_and_nothing_else_serves(
    built: Path, python: Start, compiler: str, tmp_path: Path
) -> None:
    """A missing compiler, a cache that cannot be written, an unknown instruction set: in turn in one process."""
    (tmp_path / "file").touch()
    cases = [
        {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "no-such-compiler"},
        {"TORCH_EXTENSIONS_DIR": str(tmp_path / "file"), "CXX": "c++"},
        {"TORCH_EXTENSIONS_DIR": str(built), "CXX": compiler, "PIECE_DS_ISA": "avx1024"},
    ]
    code = (
        f"import os\nfrom piece_ds import ops\nfor case in {cases}:\n    os.environ.update(case)\n"
        "    try:\n        print(ops.load('cpu'))\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n"
    )
    missing, cache, isa = result(python(code)).splitlines()
    assert missing.startswith("UserError")
    assert "no C++ compiler 'no-such-compiler'" in missing
    assert "PIECE_DS_BACKEND=reference" in missing
    assert "set TORCH_EXTENSIONS_DIR" in cache
    assert "PIECE_DS_ISA='avx1024': expected avx512, avx2 or scalar" in isa
    chosen = python(SHOW, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX="no-such-compiler", PIECE_DS_BACKEND="reference")
    assert result(chosen) == "reference"


def test_a_failing_compiler_is_an_error_and_leaves_nothing(python: Start, tmp_path: Path) -> None:
    compiler = tmp_path / "broken-c++"
    compiler.write_text(
        "#!/bin/sh\ncase \"$*\" in *scores.cpp*) echo 'x: error: no luck' >&2; exit 1;; *.cpp*) exit 0;; esac\n"
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    message = fails(python(SHOW, TORCH_EXTENSIONS_DIR=str(tmp_path), CXX=str(compiler)))
    assert not list(tmp_path.glob("piece_ds/*.so"))
    assert not list(tmp_path.glob("piece_ds/*.build-*"))
    assert "UserError: the piece_ds cpu kernels could not be compiled: x: error: no luck" in message
    assert "scores.cpp" in next(tmp_path.glob("piece_ds/*.log")).read_text()


@pytest.mark.parametrize("device_type", list(build_specs.BUILD_SPECS))
def test_the_name_of_a_library_follows_its_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device_type: str
) -> None:
    recipe = build_specs.BUILD_SPECS[device_type]
    before = recipe.library_name()
    shutil.copytree(build_specs.CSRC, tmp_path / "csrc")
    monkeypatch.setattr(build_specs, "CSRC", tmp_path / "csrc")
    assert recipe.library_name() == before
    header = tmp_path / "csrc/include/piece/scalar.h"
    header.write_text(header.read_text() + "\n// edited\n")
    assert recipe.library_name() != before


def test_another_torch_or_compiler_has_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, compiler = extension._environment("cpu"), extension.compiler_version()
    assert (extension._environment("cpu"), extension.compiler_version()) == (environment, compiler)
    monkeypatch.setattr("torch.__version__", "2.10.0")
    assert extension._environment("cpu") != environment
    monkeypatch.setenv("CXX", sys.executable)
    assert extension.compiler_version() != compiler


@pytest.mark.parametrize("named", ["no-such-compiler", "false", "g++ 'unclosed", " ", "{text}"])
def test_whatever_cannot_compile_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"\x00no program")
    text.chmod(0o755)
    monkeypatch.setenv("CXX", named.format(text=text))
    assert build_specs.compiler_version() == ""
    with pytest.raises(UserError, match=r"no C\+\+ compiler .* that works: install one"):
        build_specs.require_compiler()


def test_importing_builds_nothing(python: Start, tmp_path: Path) -> None:
    result(python("import piece_ds.ops, piece_ds.training.stream", TORCH_EXTENSIONS_DIR=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_a_wrapper_of_nvcc_does_not_hide_its_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are looked for where nvcc says it lives, not beside the first nvcc of the path; CUDA_HOME wins."""
    import torch.utils.cpp_extension

    from piece_ds.ops.builder import toolkit_of_nvcc, use_toolkit_of_nvcc

    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ _SPACE_= ' >&2\necho '#$ TOP={tmp_path}/toolkit/bin/..' >&2\n")
    wrapper.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", str(tmp_path))
    assert toolkit_of_nvcc() == str(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    use_toolkit_of_nvcc()
    assert str(tmp_path) == torch.utils.cpp_extension.CUDA_HOME
    monkeypatch.delenv("CUDA_HOME")
    use_toolkit_of_nvcc()
    assert str(tmp_path / "toolkit") == torch.utils.cpp_extension.CUDA_HOME
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolkit_of_nvcc() is None


def test_who_cannot_compile_is_told_what_serves_without() -> None:
    for device_type, builder in BUILDERS.items():
        name = builder.instead.partition(" ")[0].partition("=")[2]
        assert name in backends.providers(device_type)[1:], device_type
    assert "triton" in BUILDERS["cuda"].instead


def test_whatever_a_build_fails_of_is_one_line_with_all_of_it_in_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler that hangs or is killed while torch asks for its version, and toolkits that do not fit."""
    made = BUILDERS["cpu"]()
    for number, error in enumerate(
        (
            subprocess.CalledProcessError(1, ["c++", "-dumpfullversion"]),
            subprocess.TimeoutExpired(["ninja"], 5),
            RuntimeError("first\nx.cpp:1: error: no such thing\nlast"),
            FileNotFoundError("c++"),
            MissingCUDAException("no CUDA_HOME"),
            CUDAMismatchException("11 and 12"),
        )
    ):
        monkeypatch.setattr(made, "jit_load", lambda verbose, error=error: (_ for _ in ()).throw(error), raising=False)
        folder = tmp_path / str(number) / "build"
        folder.mkdir(parents=True)
        with pytest.raises(UserError, match=r"cpu kernels could not be compiled: .*PIECE_DS_BACKEND=reference") as said:
            made.compile_in(folder)
        assert "\n" not in str(said.value)
        assert next((tmp_path / str(number)).glob("*.log")).read_text() == str(error)
        assert ("error: no such thing (all of it" in str(said.value)) == isinstance(error, RuntimeError), error
