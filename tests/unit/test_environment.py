"""What launchers leave in the environment: completed, or refused in one line before a process waits for another."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
from support.launches import ROOT, environment
from torch.distributed import DistNetworkError

from piece_ds.preflight.accelerate_variables import check_accelerate_variables
from piece_ds.runtime import process
from piece_ds.runtime.blamed_variable import why_environment
from piece_ds.runtime.cache import cache_folder, locked, made, user_cache
from piece_ds.runtime.errors import MachineError, UserError
from piece_ds.runtime.folder_lock import FolderLock
from piece_ds.runtime.launch_environment import (
    RANK_VARIABLES,
    complete_launch_environment,
    require_accelerator,
    require_plain_warnings,
    require_readable_files,
)
from piece_ds.runtime.process import exit_code, run_command, start_distributed

TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
DIVIDED = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}

# Environment -> the line's words.
REFUSED: list[tuple[dict[str, str], str]] = [
    ({"RANK": "0"}, "RANK is set, but WORLD_SIZE is not"),
    ({"RANK": "0", "WORLD_SIZE": ""}, "RANK is set, but WORLD_SIZE is not"),
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, but RANK is not set"),
    ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', expected a whole number"),
    ({**TWO, "RANK": "2"}, "ranks are 0 to 1"),
    ({**TWO, "RANK": "-1"}, "RANK is '-1'"),
    ({**TWO, "RANK": "0.5"}, "RANK is '0.5'"),
    ({**TWO, "RANK": "9" * 5000}, "RANK is '999"),
    ({**TWO, "RANK": "²"}, "expected a whole number"),
    ({**TWO, "WORLD_SIZE": "0"}, "WORLD_SIZE is '0', expected a whole number of at least 1"),
    ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR is not"),
    ({**TWO, "MASTER_PORT": ""}, "MASTER_PORT is not"),
    ({**TWO, "MASTER_PORT": "70000"}, "at most 65535"),
    ({**TWO, "MASTER_PORT": "0"}, "MASTER_PORT is '0', expected a whole number of at least 1"),
    ({**TWO, "LOCAL_RANK": "gpu0"}, "LOCAL_RANK is 'gpu0'"),
    ({**TWO, "LOCAL_RANK": "7"}, "LOCAL_RANK is 7, but WORLD_SIZE 2"),
    ({**TWO, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0'"),
    ({**TWO, "LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE is 4, but WORLD_SIZE 2"),
    ({**TWO, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "3"}, "LOCAL_RANK is 3, but LOCAL_WORLD_SIZE 2"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no such host", "MASTER_PORT": "1"}, "does not know"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x" * 300, "MASTER_PORT": "1"}, "does not know"),
    ({"MV2_COMM_WORLD_SIZE": "4"}, "mpirun has started 4 processes"),
    ({"JSM_NAMESPACE_SIZE": "6"}, "jsrun has started 6 processes"),
    ({"FLUX_JOB_SIZE": "3"}, "flux run has started 3 processes"),
    ({"ACCELERATE_USE_FSDP": "true"}, "accelerate launch --use_fsdp): DeepSpeed trains here"),
    ({"ACCELERATE_USE_FSDP": "yes"}, "accelerate launch --use_fsdp): DeepSpeed trains here"),
    ({"ACCELERATE_USE_FSDP": "maybe"}, "ACCELERATE_USE_FSDP is 'maybe', expected true or false"),
    ({"ACCELERATE_USE_CPU": "banana"}, "ACCELERATE_USE_CPU is 'banana', expected true or false"),
    ({"ACCELERATE_DEBUG_MODE": "2"}, "ACCELERATE_DEBUG_MODE is '2'"),
    ({"ACCELERATE_TORCH_DEVICE": "cuda:9"}, "DeepSpeed chooses the device here"),
    ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "three"}, "ACCELERATE_DEEPSPEED_ZERO_STAGE is 'three'"),
    ({"OMP_NUM_THREADS": "x"}, "OMP_NUM_THREADS is 'x', expected a whole number of at least 1"),
    ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS is '0'"),
    ({"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS is '4,2'"),
    ({"DEEPSPEED_TIMEOUT": "1.5"}, "DEEPSPEED_TIMEOUT is '1.5'"),
    ({**TWO, "HF_HUB_DOWNLOAD_TIMEOUT": "soon"}, "HF_HUB_DOWNLOAD_TIMEOUT is 'soon'"),
    ({**TWO, "ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "a compiled backward pass is not proven"),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION is 'fp8'"),
    ({"SLURM_STEP_NUM_TASKS": "8"}, "srun has started 8 processes"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun has started 2 processes"),
    ({**TWO, **DIVIDED, "PARALLELISM_CONFIG_SP_SIZE": "2"}, "--parallelism_config_sp_size): DeepSpeed divides"),
    ({**DIVIDED, "PARALLELISM_CONFIG_TP_SIZE": "4"}, "PARALLELISM_CONFIG_TP_SIZE is '4'"),
]

# Environment -> LOCAL_RANK that it is completed with.
COMPLETED: list[tuple[dict[str, str], str]] = [
    ({"SLURM_STEP_NUM_TASKS": "\u00b2", "OMPI_COMM_WORLD_SIZE": "9" * 5000}, "0"),
    ({}, "0"),
    ({"OMP_NUM_THREADS": "", "ACCELERATE_USE_CPU": "", "ACCELERATE_USE_FSDP": "off"}, "0"),
    ({**DIVIDED, "PARALLELISM_CONFIG_SP_SIZE": "1"}, "0"),
    ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, "0"),  # accelerate reads it only if it is told to
    ({"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": ""}, "0"),
    ({"WORLD_SIZE": "1"}, "0"),
    ({"SLURM_STEP_NUM_TASKS": "1"}, "0"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "0"),
    (TWO, "0"),  # Kubeflow: a pod for each rank
    ({**TWO, "LOCAL_RANK": "1"}, "1"),
    ({**TWO, "LOCAL_WORLD_SIZE": "2"}, "1"),
    ({**TWO, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, "1"),
    ({**TWO, "SLURM_LOCALID": "1"}, "1"),
    ({**TWO, "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "1"),
    ({**TWO, "FLUX_TASK_LOCAL_ID": "1"}, "1"),
    ({"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "false"}, "0"),
]


_OF_STARTERS = ("SLURM_", "OMPI_", "PMI_", "MPI_", "MV2_", "JSM_", "FLUX_", "PALS_", "ACCELERATE_")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of a launcher; what the test sets is gone afterwards."""
    for name in list(os.environ):
        if name in RANK_VARIABLES or name.startswith(_OF_STARTERS):
            monkeypatch.delenv(name)
    for name in (*RANK_VARIABLES, *DIVIDED, "PARALLELISM_CONFIG_SP_SIZE", "PARALLELISM_CONFIG_TP_SIZE"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(("variables", "message"), REFUSED)
def test_what_would_wait_for_ever_is_refused(bare: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)
    with pytest.raises(UserError) as caught:
        complete_launch_environment()
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("variables", "local_rank"), COMPLETED)
def test_what_can_be_told_is_completed(bare: pytest.MonkeyPatch, variables: dict[str, str], local_rank: str) -> None:
    for name, value in variables.items():
        bare.setenv(name, value)
    complete_launch_environment()
    assert os.environ["LOCAL_RANK"] == local_rank
    assert 0 <= int(os.environ["RANK"]) < int(os.environ["WORLD_SIZE"])
    assert os.environ["MASTER_ADDR"]
    # One process leaves its port to torch: one that was free before the imports may not be when it listens.
    alone = os.environ["WORLD_SIZE"] == "1" and "MASTER_PORT" not in variables
    assert os.environ["MASTER_PORT"] == ("0" if alone else variables["MASTER_PORT"])


def test_a_process_alone_may_name_any_port(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("RANK", "0")
    bare.setenv("WORLD_SIZE", "1")
    bare.setenv("MASTER_PORT", "0")
    complete_launch_environment()


def test_what_accelerate_was_told_is_done_or_refused(bare: pytest.MonkeyPatch) -> None:
    """accelerate's configuration file says it for every run of a user; this package reads its own flags."""
    for variables, flags, message in (
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "is bf16 .* this run is in fp32, and --bf16 is not given"),
        ({"ACCELERATE_MIXED_PRECISION": "FP16"}, {"bf16": True}, "is fp16 .* this run is in bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"bf16": True}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, {"bf16": True}, None),
        ({"ACCELERATE_USE_CPU": "true"}, {}, None),  # there is no other device here
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {}, "--gradient_accumulation_steps is 1"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, {"gradient_accumulation_steps": 4}, None),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}, {"gradient_accumulation_steps": 4}, None),
        ({"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, {}, "--max_grad_norm is 1"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, None),
        ({"ACCELERATE_GRADIENT_CLIPPING": "none"}, {}, None),
    ):
        arguments: Any = SimpleNamespace(
            **{"bf16": False, "fp16": False, "use_cpu": True, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
            | flags
        )
        with bare.context() as patched:
            for name, value in variables.items():
                patched.setenv(name, value)
            with nullcontext() if message is None else pytest.raises(UserError, match=message):
                check_accelerate_variables(arguments)


def test_a_locale_in_which_no_file_can_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, refused in (("ANSI_X3.4-1968", True), ("US-ASCII", True), ("UTF-8", False), ("ISO-8859-1", False)):
        monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale, encoding=encoding: encoding)
        with (
            pytest.raises(UserError, match=f"{encoding}, in which PyTorch.*PYTHONUTF8=1") if refused else nullcontext()
        ):
            require_readable_files()


def test_warnings_of_all_libraries_as_errors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for option, refused in (
        ("error", True),
        ("error::DeprecationWarning", True),
        ("error:old:Warning:", True),
        ("error::UserWarning:my_module", False),
        ("ignore", False),
        ("default::DeprecationWarning", False),
    ):
        monkeypatch.setattr("sys.warnoptions", ["ignore", option])
        with pytest.raises(UserError, match="unset PYTHONWARNINGS, drop -W") if refused else nullcontext():
            require_plain_warnings()


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIECE_DS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as of a container's user without a name
    for folder in (cache_folder, user_cache):
        with pytest.raises(UserError, match=r"~/\.cache cannot be found.*set HOME, or PIECE_DS_CACHE"):
            folder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "piece_ds"
    monkeypatch.setenv("PIECE_DS_CACHE", "~nobody-at-all/x")
    with pytest.raises(UserError, match="~nobody-at-all/x cannot be found"):
        cache_folder()


def test_the_cache_is_in_the_users_home_unless_another_folder_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("PIECE_DS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (user_cache(), cache_folder()) == (tmp_path / ".cache", tmp_path / ".cache" / "piece_ds")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/mine")
    assert cache_folder() == tmp_path / "mine" / "piece_ds"
    monkeypatch.setenv("PIECE_DS_CACHE", "~/own")
    assert (user_cache(), cache_folder()) == (tmp_path / "mine", tmp_path / "own")


def test_a_cache_that_cannot_be_locked_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(MachineError, match=r"cannot be locked .*No locks available"), locked(tmp_path / "x"):
        pass
    # A run's folder is then taken without a lock.
    lock = FolderLock(tmp_path)
    assert lock.take()
    assert not lock.is_held


def test_a_cache_that_is_no_folder_is_the_users_to_name_and_a_full_disk_is_the_machines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "models"):
        with pytest.raises(UserError, match=r"cannot be written .*: name another one with PIECE_DS_CACHE"):
            made(folder)
        with pytest.raises(UserError, match="PIECE_DS_CACHE"), locked(folder / "x"):
            pass
    assert made(tmp_path / "new" / "models").is_dir()

    def fill(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.mkdir", fill)
    with pytest.raises(MachineError, match="No space left"):
        made(tmp_path / "more")


def test_an_accelerator_that_is_unknown_or_not_there_is_refused(bare: pytest.MonkeyPatch) -> None:
    def choose() -> SimpleNamespace:
        if os.environ["DS_ACCELERATOR"] == "banana":
            raise ValueError("DS_ACCELERATOR must be one of cpu, cuda")
        return SimpleNamespace(is_available=lambda: False)

    bare.setattr("deepspeed.accelerator.get_accelerator", choose)
    for name, message in (("banana", r"'banana' \(DS_ACCELERATOR must be one"), ("cuda", "'cuda', which this machine")):
        bare.setenv("DS_ACCELERATOR", name)
        with pytest.raises(UserError, match=f"DS_ACCELERATOR is {message}.*: unset it, or set it to cpu"):
            require_accelerator()
    for name in ("", "cpu"):
        bare.setenv("DS_ACCELERATOR", name)
        require_accelerator()


def test_the_variable_that_a_library_fails_at_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("GLOO_SOCKET_IFNAME", "nope0"),
        ("MPLBACKEND", "banana"),
        ("HF_HOME", "/sys/x"),
        ("OMP_X", "1"),
    ):
        monkeypatch.setenv(name, value)
    for error, message in (
        (RuntimeError("Unable to find address for: nope0"), "GLOO_SOCKET_IFNAME is 'nope0', at which a library fails"),
        (
            ValueError("Key backend: 'banana'\n is not a valid"),
            r"MPLBACKEND is 'banana'.*\(Key backend: 'banana' is not",
        ),
        (PermissionError(1, "not permitted", "/sys/x/hub"), "HF_HOME is '/sys/x'"),
        (ValueError("bad OMP_X"), "OMP_X is '1'.*mend it, or unset it"),
        (DeprecationWarning("use torch.compile"), "use torch.compile.*unset PYTHONWARNINGS, or drop -W"),
        (ImportError("cannot import name 'a' from '/sys/x/b.py'"), None),
        (RuntimeError("1 element"), None),
    ):
        found = why_environment(error)
        assert re.search(message, found or "") if message else found is None, error
        assert "\n" not in (found or "")

    # Before ranks meet it is the command's whole answer; afterwards an error may name a value by chance.
    def fail(argv: list[str]) -> None:
        raise ValueError("banana")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("piece_ds.runtime.process._say_failure", lambda error: None)
    for met, code in ((False, 2), (True, 1)):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda met=met: met)
        assert exit_code(fail, []) == code


def test_rank_0_says_at_once_what_other_ranks_say_only_if_it_has_not_ended_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for error, line in ((UserError("banana"), "error: banana\n"), (MachineError("no disk"), "error: no disk\n")):

        def fail(argv: list[str], error: Exception = error) -> None:
            raise error

        for rank in range(3):
            waits.clear()
            monkeypatch.setenv("RANK", str(rank))
            exit_code(fail, [])
            assert capsys.readouterr().err == line
            assert bool(waits) == (rank > 0)


def test_a_port_in_use_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, kind in (("code: -98, name: EADDRINUSE", UserError), ("connection reset", DistNetworkError)):

        def fail(*, text: str = text, **options: object) -> None:
            raise DistNetworkError(text)

        monkeypatch.setattr(deepspeed, "init_distributed", fail)
        monkeypatch.setenv("MASTER_PORT", "29512")
        with pytest.raises(kind, match="MASTER_PORT 29512 is in use" if kind is UserError else text):
            start_distributed()


def test_everything_is_asked_for_before_a_command_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What one of them refuses is one line, and the command itself never runs."""
    steps = (
        "require_readable_files", "require_plain_warnings", "one_process_environment", "require_accelerator",
        "_own_programs_first", "set_cublas_workspace", "_quiet",
    )  # fmt: skip
    calls: list[Any] = []

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(process, "_leave", leave)
    for name in ("keep_streams", *steps):
        monkeypatch.setattr(process, name, lambda name=name: calls.append(name))
    with pytest.raises(SystemExit, match=r"^0$"):
        run_command(calls.append, ["--local_rank=3", "--seed", "1", "--local-rank=3"])
    assert calls == ["keep_streams", *steps, ["--seed", "1"]]

    for name in steps:

        def refuse(name: str = name) -> None:
            raise UserError(f"{name}:\n do this")

        with monkeypatch.context() as patched:
            patched.setattr(process, name, refuse)
            with pytest.raises(SystemExit, match=r"^2$"):
                run_command(lambda words: pytest.fail("it ran"), [])
        assert capsys.readouterr().err == f"error: {name}: do this\n"


def test_a_command_says_it_in_one_line_and_ends_with_2() -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--help"],
        cwd=ROOT,
        env={**environment(), "RANK": "3", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.strip().splitlines()[-1] == "error: RANK is 3, but WORLD_SIZE 2: ranks are 0 to 1"
    assert "Traceback" not in run.stderr
