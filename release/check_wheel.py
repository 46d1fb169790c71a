"""Check a wheel as a user meets it: alone in an empty folder, on a machine without a compiler.

    python release/check_wheel.py dist/*.whl

The environment must hold what piece_ds needs; the wheel's own files are unpacked and come first. A wheel with kernels
must serve every op with them and train two steps, with no compiler to be found and nothing in the cache of kernels. A
pure wheel must say what to do. Ends with code 1 at the first check that fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OPS = "import sys; from piece_ds import ops; ops.load('cpu'); print(sys.modules['piece_ds'].__file__)"
MODEL = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
from piece_ds.demo.model import VOCAB_SIZE, make_tokenizer
config = LlamaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
make_tokenizer(256).save_pretrained(sys.argv[1])
"""


def main() -> None:
    """Check every wheel that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path)
    for wheel in parser.parse_args().wheels:
        with tempfile.TemporaryDirectory() as folder:
            check(wheel, Path(folder))


def check(wheel: Path, folder: Path) -> None:
    """Run all checks of one wheel in an empty folder. Raise SystemExit if one fails."""
    names = zipfile.ZipFile(wheel).namelist()
    zipfile.ZipFile(wheel).extractall(folder / "site")
    has_kernels = any(name.startswith("piece_ds/ops/piece_ds_cpu_") for name in names)

    # What must be in every wheel, and what in none.
    for needed in ("piece_ds/py.typed", "piece_ds/ds_configs/zero3.json", "piece_ds/csrc/cpu/scores.cpp"):
        require(needed in names, f"{needed} is missing")
    require(not any(name.startswith(("tests/", "bench/", "release/")) for name in names), "it holds more than piece_ds")

    # No compiler, and no kernels of an earlier build.
    (folder / "bin").mkdir()
    environment = {
        "HOME": str(folder),
        "PATH": str(folder / "bin"),
        "PYTHONPATH": str(folder / "site"),
        "TORCH_EXTENSIONS_DIR": str(folder / "kernels"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}

    def run(*command: str) -> "subprocess.CompletedProcess[str]":
        (folder / "work").mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, *command], cwd=folder / "work", env=environment, capture_output=True, text=True
        )

    done = run("-m", "piece_ds", "--version")
    require(done.returncode == 0 and wheel.name.split("-")[1] in done.stdout, f"--version: {done.stdout}{done.stderr}")
    done = run("-c", OPS)
    if not has_kernels:
        require(
            done.returncode != 0 and "PIECE_DS_BACKEND=reference" in done.stderr, f"no advice: {done.stderr[-500:]}"
        )
        print(f"{wheel.name}: without a compiler it says what to do")
        return
    require(done.returncode == 0 and str(folder) in done.stdout, f"its kernels do not load: {done.stderr[-2000:]}")

    # Two steps, from the flags to the files.
    require(run("-c", MODEL, "model").returncode == 0, "the model cannot be made")
    rows = [{"prompt": f"{n} is", "answer": "odd" if n % 2 else "even"} for n in range(16)]
    (folder / "work" / "rows.json").write_text(json.dumps(rows))
    flags = {"deepspeed": "zero2", "model_name_or_path": "model", "train_file": "rows.json", "output_dir": "run"}
    numbers = {"mask_ratio": 0.05, "max_steps": 2, "per_device_train_batch_size": 4, "validation_share": 0.25}
    words = [word for name, value in (flags | numbers).items() for word in (f"--{name}", str(value))]
    done = run("-m", "piece_ds", "train", *words)
    require(done.returncode == 0, f"training failed: {done.stderr[-2000:]}")
    require((folder / "work" / "run" / "00-rows" / "delta.safetensors").is_file(), "no delta was written")
    require(not (folder / "kernels").exists(), "something was compiled")
    print(f"{wheel.name}: trains without a compiler")


def require(is_so: bool, problem: str) -> None:
    """Raise SystemExit with a problem unless all is well."""
    if not is_so:
        raise SystemExit(f"error: {problem}")


if __name__ == "__main__":
    main()
