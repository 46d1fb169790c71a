"""bench/gpu.sh, whole, with stubs for what needs a GPU: a part that fails leaves all others their results."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.forks import fork

ROOT = Path(__file__).parents[2]
# Writes what the real command would write; fails where its arguments hold STUB_FAILS.
STUB = r"""#!/bin/bash
all="$*"
[ "$1" = - ] && cat >/dev/null
for argument; do
  [ -n "$take" ] && echo "stub $all" >"$argument"
  take=
  case "$argument" in
    --output) take=1 ;;
    --junitxml=*) echo "stub" >"${argument#*=}" ;;
  esac
done
[[ "$all" == *gpu_e2e.py* ]] && mkdir -p "$2" && echo "{}" >"$2/e2e.json"
if [ -n "$STUB_FAILS" ] && [[ "$all $TOOLS" == *"$STUB_FAILS"* ]]; then
  [ -n "$STUB_HANGS" ] && exec sleep 60
  exit 3
fi
exit 0
"""
FILES = {
    "": {"ops.xml", "e2e.json", "kernels.csv", "cost-8-layers.csv", "cost-8b.csv", "overhead.csv", "compile.csv"},
    "--second": {
        "e2e.json",
        "kernels.csv",
        "sampled_gradients.csv",
        "overhead.csv",
        "cost.csv",
        "cost-fetching.csv",
    },
}
# What a part's command line holds -> its name in the report.
PARTS = {
    "piece_ds.ops": "build and providers",
    "test_ops_cuda.py": "ops",
    "gpu_e2e.py": "e2e",
    "gpu_repeat.py": "repeat",
    "racecheck": "sanitize-racecheck",
    "kernels/bench/run.py": "kernel table",
    "overhead.py": "overhead",
}
PARTS_OF = {
    "": {**PARTS, "--layers 8": "cost, 8 layers of Llama-3-8B", "compile.csv": "kernel table, torch.compile"},
    "--second": {
        **PARTS,
        "gradient_table.py": "when a sampled gradient pays",
        "gpu_step.py --zero 3": "where a compact step at ZeRO-3 goes",
        "out/cost.csv": "cost, Llama-3-8B",
    },
}


def run(folder: Path, mode: str, **environment: str) -> tuple[int, str, set[str]]:
    """(exit code, log, files left)."""
    stubs = folder / "stubs"
    stubs.mkdir(parents=True)
    for name in ("python", "nvidia-smi", "compute-sanitizer", "nvcc"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    settings = {"PYTHON": str(stubs / "python"), "OUT": str(folder / "out"), "WORK": str(folder / "work")}
    settings |= {"PATH": f"{stubs}:{os.environ['PATH']}", "SANITIZER": str(stubs / "compute-sanitizer")}
    settings |= {"CUDA_HOME": str(folder), "STUB_FAILS": "", "STUB_HANGS": "", **environment}
    command = [str(ROOT / "bench" / "gpu.sh"), *([mode] if mode else [])]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=120)
    out = folder / "out"
    return done.returncode, (out / "log.txt").read_text(), {path.name for path in out.iterdir()} - {"log.txt"}


def failures(log: str) -> str:
    return re.findall(r"^failed: (.*) \(after \d+ s\)$", log, re.MULTILINE)[-1]


@pytest.mark.parametrize("mode", list(FILES))
def test_all_parts_leave_at_most_eight_files(tmp_path: Path, mode: str) -> None:
    code, log, files = run(tmp_path, mode)
    assert (code, failures(log)) == (0, "nothing")
    assert files == FILES[mode]
    assert len(files) <= 8


@pytest.mark.parametrize("mode", list(FILES))
def test_a_part_that_fails_leaves_the_others_their_results(tmp_path: Path, mode: str) -> None:
    for number, (mark, name) in enumerate(PARTS_OF[mode].items()):
        code, log, files = run(tmp_path / str(number), mode, STUB_FAILS=mark)
        assert code == 1, name
        assert f"{name} (" in failures(log), (name, failures(log))
        assert files == FILES[mode], name
        others = [other for other in PARTS_OF[mode].values() if other != name and f"{other} (" in failures(log)]
        assert all(other.startswith(name) for other in others), (name, failures(log))


def test_a_part_that_hangs_is_cut_and_named(tmp_path: Path) -> None:
    """What the budget has no time for is named too; what was there before is there."""
    code, log, files = run(tmp_path, "--second", STUB_FAILS="kernels/bench/run.py", STUB_HANGS="1", BUDGET="6")
    assert code == 1
    assert "kernel table (124)" in failures(log)
    assert "(no time)" in failures(log)
    assert "e2e.json" in files


def test_only_parts_that_are_asked_for_run(tmp_path: Path) -> None:
    code, log, files = run(tmp_path, "--second", PARTS="^cost, Llama-3-8B$|repeat")
    assert (code, failures(log)) == (0, "nothing")
    assert re.findall(r"^== (.*?) \(", log, re.MULTILINE) == ["build and providers", "repeat", "cost, Llama-3-8B"]
    assert "cost.csv" in files


@pytest.mark.parametrize(("mode", "most"), [("", 560), ("--second", 540)])
def test_no_limit_is_beyond_the_budget(tmp_path: Path, mode: str, most: int) -> None:
    _, log, _ = run(tmp_path, mode)
    limits = [(int(at), int(limit)) for at, limit in re.findall(r"\(at (\d+) s, at most (\d+) s\)", log)]
    assert len(limits) >= 8
    assert all(at + limit <= most for at, limit in limits)


def test_every_script_that_a_command_names_is_there() -> None:
    """A stub takes any name: a moved script would be missed on the GPU alone."""
    texts = [*(ROOT / "bench").glob("*.sh"), ROOT / "Makefile"]
    named = {name for text in texts for name in re.findall(r"(?<![\w/$])(?:[\w]+/)+\w+\.(?:py|sh)\b", text.read_text())}
    assert {"kernels/bench/run.py", "bench/cost.py", "bench/sanitize.sh"} <= named
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


@pytest.mark.parametrize("name", ["kernels/bench/run.py", "kernels/bench/gradient_table.py"])
def test_scripts_of_kernels_run_from_anywhere(tmp_path: Path, name: str) -> None:
    """In a fork that finds of the repository what Python would find: the package, and the script's own folder."""

    def run_there() -> None:
        os.chdir(tmp_path)
        sys.path[:] = [path for path in sys.path if path and Path(path) not in (ROOT, ROOT / "tests")]
        sys.path.insert(0, str((ROOT / name).parent))
        for module in [module for module in sys.modules if module.partition(".")[0] in ("bench", "cases", "timing")]:
            del sys.modules[module]
        sys.argv = [name, "--help"]
        with pytest.raises(SystemExit) as leaving:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        assert leaving.value.code == 0

    process = fork(run_there, tmp_path / "output")
    assert os.waitpid(process, 0)[1] == 0, (tmp_path / "output").read_text()
    assert "usage:" in (tmp_path / "output").read_text()
