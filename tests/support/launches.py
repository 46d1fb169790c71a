"""Launch scripts as a user starts them, on a tiny model and tiny tasks made here."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from piece_ds.demo.model import VOCAB_SIZE, make_tokenizer
from piece_ds.runtime.launch_environment import RANK_VARIABLES
from piece_ds.runtime.process import one_process_environment

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "ds_configs"
PROGRAMS = Path(sys.executable).parent
SHARED = Path(os.environ.get("PIECE_DS_SHARED", ROOT.parent / "shared"))
TIMEOUT_SECONDS = 900


def make_model_folder(
    folder: Path, dtype: torch.dtype = torch.float32, hidden_size: int = 32, num_layers: int = 2
) -> Path:
    """A Llama of bytes with its tokenizer. Large initial weights, so that gradients differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    make_tokenizer(256).save_pretrained(folder)
    return folder


def make_rows(seed: int, num_rows: int, choices: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows whose answers follow from the prompt; prompts of different lengths."""
    rng = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        word = "".join(rng.choices("abcdefgh", k=rng.randint(3, 9)))
        rows.append({"prompt": f"{word}=", "answer": choices[word.count("a") % len(choices)]})
    return rows


def make_tasks(folder: Path) -> Path:
    """Tasks `letter` (a choice, hence an accuracy) and `text` (free text): 32 training rows each."""
    for seed, (name, choices) in enumerate({"letter": ("A", "B"), "text": ("none at all", "a few", "many")}.items()):
        (folder / name).mkdir(parents=True)
        for split, num_rows in (("train", 32), ("eval", 4), ("test", 6)):
            write_rows(folder / name / f"{split}.json", make_rows(10 * seed + num_rows, num_rows, choices))
    return folder


def write_rows(path: Path, rows: list[Any]) -> Path:
    """rows as a JSON list, or one to a line where path ends in .jsonl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def launch(launcher: str, num_ranks: int, script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    """Run launch/SCRIPT under 'deepspeed', 'torchrun' or plain 'python' and wait for it."""
    return subprocess.run(
        command_line(launcher, num_ranks, script, *flags),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def command_line(launcher: str, num_ranks: int, script: str, *flags: object) -> list[str]:
    starters = {
        "deepspeed": [PROGRAMS / "deepspeed", "--num_accelerators", num_ranks, "--master_port", free_port()],
        "torchrun": [PROGRAMS / "torchrun", "--nproc_per_node", num_ranks, "--master_port", free_port()],
        "python": [sys.executable],
    }
    return [str(item) for item in (*starters[launcher], ROOT / "launch" / script, *flags)]


def kill_when(path: Path, flags: list[str], num_ranks: int) -> None:
    """Launch, wait until path exists, then kill the launcher and every rank at once."""
    command = command_line("deepspeed", num_ranks, "train.py", *flags)
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists():
        assert process.poll() is None, f"ended with {process.returncode} before {path} was there"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        os.kill(member.pid, signal.SIGKILL)
    psutil.wait_procs(family)
    process.wait()


def environment() -> dict[str, str]:
    """A user's environment on a machine without network and accelerator; nothing of another launch in it.

    accelerate, for one, writes LOCAL_WORLD_SIZE into the process of a test that trains without a launcher.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    path = f"{PROGRAMS}{os.pathsep}{inherited.get('PATH', '')}"
    return {**inherited, "PATH": path, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@contextmanager
def one_process() -> Iterator[None]:
    """Inside, commands may run in the test's own process, as rank 0 of 1; the environment is restored."""
    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_VARIABLES:
            patch.delenv(name, raising=False)
        one_process_environment()
        yield


def free_port() -> int:
    """Return a port for a launcher that listens seconds later, when it has imported torch.

    It is none of those that the kernel gives to whoever asks for any, if there are others: each connection of another
    test takes one.
    """
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [port for port in range(10_000, 65_536) if not first <= port <= last] or range(first, last + 1)
    while True:
        port = random.SystemRandom().choice(ports)  # a test's own seed would give two the same
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def succeeded(run: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert run.returncode == 0, f"exit code {run.returncode}\n{run.stdout[-3000:]}\n{run.stderr[-6000:]}"
    return run


def error_lines(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("error:")]


def weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of a model folder."""
    return load_file(folder / "model.safetensors")


def mask_index(path: Path) -> dict[str, Tensor]:
    """Selected positions of a mask file, decoded bit by bit as its format says."""
    index = {}
    for name, bits in load_file(path).items():
        flags = (bits.long().unsqueeze(1) >> torch.arange(8)) & 1
        index[name] = flags.view(-1).nonzero().view(-1)
    return index


def same_mask(first: Path, second: Path) -> bool:
    """Whether two task folders hold the same mask. (Bytes of the files may differ: the header has no order.)"""
    one, other = (mask_index(folder / "mask.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Flat positions whose bits differ, per tensor that has any."""
    assert before.keys() == after.keys()
    found = {}
    for name, old in before.items():
        assert old.dtype == after[name].dtype
        assert old.shape == after[name].shape
        integer = torch.int32 if old.dtype == torch.float32 else torch.int16
        differs = (old.view(integer) != after[name].view(integer)).view(-1).nonzero().view(-1)
        if differs.numel():
            found[name] = differs
    return found


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return not changed(first, second)


def tree(folder: Path) -> set[str]:
    """Every file below folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
