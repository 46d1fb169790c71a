"""What a scheduler sees: signals through the launchers, and their exit codes."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from support.launches import CONFIGS, command_line, environment, make_model_folder, make_rows, write_rows

from piece_ds.runtime.signals import STOP_CODE


def launch_and_signal(folder: Path, launcher: str, num_ranks: int, to_rank: int | None, signum: int) -> tuple[int, str]:
    """Start a long task, signal a rank (None: the launcher) after its first checkpoint; (exit code, stderr)."""
    make_model_folder(folder / "model")
    write_rows(folder / "rows.json", make_rows(1, 64, ("A", "B")))
    flags = [
        "--deepspeed",
        CONFIGS / "zero2.json",
        "--model_name_or_path",
        folder / "model",
        "--train_file",
        folder / "rows.json",
        "--mask_ratio",
        "0.05",
        "--max_steps",
        "5000",
        "--save_steps",
        "3",
        "--save_total_limit",
        "1",
        "--max_eval_samples",
        "2",
        "--max_new_tokens",
        "2",
        "--output_dir",
        folder / "out",
    ]
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(
            command_line(launcher, num_ranks, "train.py", *flags), env=environment(), stdout=errors, stderr=errors
        )
    deadline = time.monotonic() + 300
    while not list((folder / "out").glob("*/checkpoint-*/SHA256SUMS")):
        assert process.poll() is None, (folder / "stderr").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    try:
        os.kill(launch_process(family) if to_rank is None else rank_process(family, to_rank), signum)
        code = process.wait(timeout=120)
    finally:
        for member in family:
            if member.is_running():
                member.kill()
    return code, (folder / "stderr").read_text()


def launch_process(family: list[psutil.Process]) -> int:
    """The process that `deepspeed` starts on a node, which starts the ranks."""
    return next(process.pid for process in family if "deepspeed.launcher.launch" in process.cmdline())


def rank_process(family: list[psutil.Process], rank: int) -> int:
    """The process of one rank."""
    for process in family:
        script = next((item for item in process.cmdline()[:3] if item.endswith("launch/train.py")), None)
        if script is not None and process.environ().get("RANK", "0") == str(rank):
            return process.pid
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "num_ranks", "to_rank", "signum", "code"),
    [
        ("python", 1, 0, signal.SIGTERM, STOP_CODE),
        ("deepspeed", 2, 1, signal.SIGUSR1, STOP_CODE),
        ("deepspeed", 2, None, signal.SIGTERM, None),  # deepspeed's own code is not promised
        ("torchrun", 2, 0, signal.SIGUSR1, None),
    ],
    ids=["python", "deepspeed-rank", "deepspeed-launcher", "torchrun-rank"],
)
def test_a_signal_ends_a_launched_run_with_a_checkpoint_and_one_line(
    tmp_path: Path, launcher: str, num_ranks: int, to_rank: int | None, signum: int, code: int | None
) -> None:
    found, errors = launch_and_signal(tmp_path, launcher, num_ranks, to_rank, signum)
    stopped = [line for line in errors.splitlines() if line.startswith(f"stopped by {signal.Signals(signum).name} ")]
    assert len(stopped) == 1, errors[-3000:]
    step = int(stopped[0].split("after step ")[1].split()[0])
    assert (tmp_path / "out" / "00-rows" / f"checkpoint-{step}" / "SHA256SUMS").is_file()
    assert found != 0
    assert code is None or found == code, errors[-3000:]
    print(launcher, to_rank, "exit code", found)
