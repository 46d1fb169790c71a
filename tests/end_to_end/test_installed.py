"""The built wheel, alone in an empty folder: commands, configurations by name, and the call from Python."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.launches import PROGRAMS, ROOT, free_port, make_model_folder, make_rows, write_rows

from piece_ds.runtime.extras import EXTRAS

pytestmark = pytest.mark.slow

FLAGS = [
    "--max_steps",
    "2",
    "--mask_ratio",
    "0.05",
    "--per_device_train_batch_size",
    "4",
    "--save_model",
    "last",
    "--validation_share",
    "0.25",
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of processes that see the wheel's files and no checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "piece_ds", folder / "src" / "piece_ds")  # building leaves files beside the sources
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder / "src" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", ".", "./src"]
    subprocess.run(command, check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("piece_ds/ds_configs/")}
    assert len(names) == 7
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(folder / "site"), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def test_commands_of_the_wheel_run_anywhere(installed: dict[str, str], tmp_path: Path) -> None:
    model = make_model_folder(tmp_path / "model")
    messages = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]}
        for row in make_rows(1, 32, ("A", "B"))
    ]
    write_rows(tmp_path / "my.jsonl", messages)

    def run(*command: object) -> str:
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, env=installed, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout + done.stderr

    shared = ["--model_name_or_path", model, "--train_file", "my.jsonl"]
    said = run(
        sys.executable, "-m", "piece_ds", "train", *shared, *FLAGS, "--deepspeed", "zero2", "--output_dir", "one"
    )
    assert "my.jsonl: 32 rows, chat messages" in said
    torchrun = [PROGRAMS / "torchrun", "--nproc_per_node", 2, "--master_port", free_port(), "-m", "piece_ds"]
    run(*torchrun, "train", *shared, *FLAGS, "--output_dir", "two")
    deepspeed = [PROGRAMS / "deepspeed", "--num_accelerators", 2, "--master_port", free_port(), "--module", "piece_ds"]
    run(*deepspeed, "select", *shared, "--packing", "--output_file", "mask.safetensors")
    run(*deepspeed, "evaluate", *shared, "--output_file", "scores.json")
    for folder in ("one", "two"):
        assert (tmp_path / folder / "00-my" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "mask.safetensors").is_file()
    assert json.loads((tmp_path / "scores.json").read_text())["loss"]["my"] > 0

    rows = "{'x': [{'prompt': 'a', 'answer': 'b'}] * 8}"
    call = f"import piece_ds; r = piece_ds.train('model', {rows}, 'three', max_steps=1, "
    run(sys.executable, "-c", call + "per_device_train_batch_size=4, deepspeed='zero0'); print(r.tasks)")
    assert (tmp_path / "three" / "report.html").is_file()


@pytest.fixture
def without_extras(installed: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The same environment, in which the libraries of the extras cannot be imported."""
    modules = [module for modules in EXTRAS.values() for module in modules]
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({modules}))\n")
    return {**installed, "PYTHONPATH": f"{hidden}{os.pathsep}{installed['PYTHONPATH']}"}


def test_training_to_the_report_needs_no_extra(without_extras: dict[str, str], tmp_path: Path) -> None:
    """A task of free text, scored; a method that needs an extra ends in one line that names it."""
    write_rows(tmp_path / "my.json", make_rows(1, 32, ("one two three four", "five six seven eight")))
    train = [sys.executable, "-m", "piece_ds", "train", "--model_name_or_path", make_model_folder(tmp_path / "model")]
    train += ["--train_file", "my.json", *FLAGS, "--deepspeed", "zero2", "--output_dir"]

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(list(map(str, command)), cwd=tmp_path, env=without_extras, capture_output=True, text=True)

    done = run(*train, "default")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "default" / "report.html").is_file()
    assert run(sys.executable, "-m", "piece_ds", "report", "default").returncode == 0

    for method, extra in (("lora", "peft"), ("gem", "statistics")):
        refused = run(*train, method, "--method", method)
        assert refused.returncode == 2
        assert f"pip install 'piece_ds[{extra}]'" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert not (tmp_path / method).exists()
