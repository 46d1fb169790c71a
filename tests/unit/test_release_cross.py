"""release/cross.py without its compiler: what it refuses, the commands it runs, and the wheel that it makes."""

import importlib.util
import shutil
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from piece_ds.ops.build_specs import BUILD_SPECS

ROOT = Path(__file__).parents[2]
MACHINES = ("aarch64", "x86_64")


@pytest.fixture(scope="module")
def cross() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_cross", ROOT / "release" / "cross.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def calls(cross: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands, none of which runs."""
    made: list[list[str]] = []
    monkeypatch.setattr(cross, "call", lambda *words: made.append([str(word) for word in words]))
    return made


def library_of_gcc(prefix: Path, machine: str) -> Path:
    for version in ("9", "12"):
        (prefix / "include" / "c++" / version / f"{machine}-linux-gnu").mkdir(parents=True)
    return prefix


def words_after(command: list[str], flag: str) -> list[str]:
    return [word for before, word in pairwise(command) if before == flag]


def test_an_unknown_machine_is_refused_by_the_names_of_those_that_are_known(
    cross: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cross.main(["riscv64", "a.whl", "--torch", "b.whl"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "'riscv64'" in said
    assert all(machine in said for machine in MACHINES)


def test_what_is_missing_is_said_before_anything_is_compiled(
    cross: ModuleType, calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pure, theirs = tmp_path / "piece_ds-1-py3-none-any.whl", tmp_path / "torch-2-cp311-cp311-manylinux_2_28_aarch64.whl"
    other = theirs.with_name(theirs.name.replace("aarch64", "x86_64"))
    built = pure.with_name("piece_ds-1-cp311-abi3-linux_x86_64.whl")
    for file in (pure, theirs, other, built):
        file.touch()
    prefix = library_of_gcc(tmp_path / "gcc", "aarch64")
    monkeypatch.setattr(
        cross.importlib.util, "find_spec", lambda name: None if name == "elftools" else SimpleNamespace()
    )
    monkeypatch.setattr(cross.shutil, "which", lambda name: f"/usr/bin/{name}")
    for wheel, of_torch, library, message in (
        (tmp_path / "none-any.whl", theirs, prefix, r"none-any.whl does not exist: release/build.sh"),
        (built, theirs, prefix, r"expected a wheel named \*-none-any.whl, got piece_ds-1-cp311-abi3-linux_x86_64.whl"),
        (pure, other, prefix, r"expected a wheel named \*_aarch64.whl, got torch.*--platform manylinux_2_28_aarch64"),
        (pure, theirs, tmp_path, r"holds no include/c\+\+: install libstdc\+\+-12-dev-arm64-cross"),
        (pure, theirs, prefix, r"^error: pip install auditwheel$"),
    ):
        with pytest.raises(SystemExit, match=message) as stopped:
            cross.main(["aarch64", str(wheel), "--torch", str(of_torch), "--prefix", str(library)])
        assert "\n" not in str(stopped.value)
    assert calls == []


def test_every_source_is_compiled_once_for_the_machine_and_linked_into_one_library(
    cross: ModuleType, calls: list[list[str]], tmp_path: Path
) -> None:
    spec = BUILD_SPECS["cpu"]
    for machine in MACHINES:
        calls.clear()
        prefix, folder = library_of_gcc(tmp_path / machine, machine), tmp_path / f"{machine}-build"
        library = cross.compile_for(machine, folder, prefix, [Path("libc10.so"), Path("libtorch_cpu.so")])
        assert library == folder / f"{spec.library_name()}.abi3.so"
        *compiles, link = calls
        assert all(words_after(command, "-target") == [f"{machine}-linux-gnu.2.28"] for command in calls)
        assert [words_after(command, "-c") for command in compiles] == [[str(path)] for path in spec.source_files()]
        objects = [words_after(command, "-o")[0] for command in compiles]
        assert len(set(objects)) == len(spec.source_files()) > 1
        for command in compiles:
            assert set(spec.cxx_args) <= set(command)
            # GCC's own headers, the newest, come before all others.
            headers = [word[2:] for word in command if word.startswith("-I")]
            newest = prefix / "include" / "c++" / "12"
            assert headers[1:3] == [str(newest), str(newest / f"{machine}-linux-gnu")]
        assert words_after(link, "-o") == [str(library)]
        assert {*objects, "libc10.so", "libtorch_cpu.so", "-shared"} <= set(link)


def test_the_wheel_holds_the_library_and_is_tagged_for_its_machine(
    cross: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pure, library = tmp_path / "piece_ds-1-py3-none-any.whl", tmp_path / "piece_ds_cpu_0.abi3.so"
    with zipfile.ZipFile(pure, "w") as archive:
        archive.writestr("piece_ds/ops/__init__.py", "")
        archive.writestr("piece_ds-1.dist-info/WHEEL", "Root-Is-Purelib: true\nTag: py3-none-any\n")
    library.write_bytes(b"machine code")
    audited = "manylinux_2_27"  # what auditwheel says

    def run(*words: object) -> None:
        """Do what the two programs do, in short."""
        command = [str(word) for word in words]
        if "unpack" in command:
            with zipfile.ZipFile(command[4]) as archive:
                archive.extractall(Path(command[6]) / "piece_ds-1")
        elif "pack" in command:
            tag = (Path(command[4]) / "piece_ds-1.dist-info" / "WHEEL").read_text().rpartition("Tag: ")[2].strip()
            packed = shutil.make_archive(str(tmp_path / "packed"), "zip", command[4])
            shutil.move(packed, Path(command[6]) / f"piece_ds-1-{tag}.whl")
        else:
            assert command[2:4] == ["auditwheel", "repair"]
            assert words_after(command, "--exclude") == ["libc10.so", "libtorch_cpu.so"]
            folder = Path(words_after(command, "--wheel-dir")[0])
            folder.mkdir()
            (folder / Path(command[-1]).name.replace("manylinux_2_28", audited)).touch()

    monkeypatch.setattr(cross, "call", run)
    for machine in MACHINES:
        (folder := tmp_path / machine).mkdir()
        made = cross.wheel_with(pure, library, machine, folder)
        assert made.name == f"piece_ds-1-cp311-abi3-manylinux_2_28_{machine}.whl"
        with zipfile.ZipFile(made) as archive:
            assert archive.read(f"piece_ds/ops/{library.name}") == b"machine code"
            assert b"Root-Is-Purelib: false" in archive.read("piece_ds-1.dist-info/WHEEL")
    audited = "manylinux_2_34"
    (tmp_path / "newer").mkdir()
    with pytest.raises(SystemExit, match=r"manylinux_2_34_x86_64.whl, which is not for glibc 2\.28"):
        cross.wheel_with(pure, library, "x86_64", tmp_path / "newer")


def test_a_library_of_another_machine_or_with_symbols_that_nobody_has_is_refused(cross: ModuleType) -> None:
    pytest.importorskip("elftools", reason="pyelftools, which comes with auditwheel, is not installed")
    library = Path(torch.__file__).parent / "lib" / "libtorch.so"
    lacking = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    with cross.elf_file(library) as elf:
        machine = elf["e_machine"]
    with pytest.raises(SystemExit, match=f"libtorch.so is of machine {machine}, expected EM_NONE"):
        cross.check_library(library, "EM_NONE", [])
    with pytest.raises(SystemExit, match=r"libtorch_python.so needs .*c10.*, which no library has"):
        cross.check_library(lacking, machine, [])
    assert cross.symbols(lacking, defined=True)


def test_a_failing_command_ends_it_with_the_commands_own_words(cross: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"error: .* -c .*: no such header"):
        cross.call(sys.executable, "-c", "import sys; sys.exit('no such header')")
