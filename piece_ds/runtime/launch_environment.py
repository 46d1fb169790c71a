"""The variables by which a launcher tells each process its rank: complete and consistent, or refused in one line.

A wrong rank makes all processes wait for one that never comes, so it is found before any of them connects.
"""

import codecs
import locale
import os
import socket
import sys

from piece_ds.runtime.errors import UserError

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Other starters' rank on this machine, in the order in which they are asked.
_LOCAL_RANKS = (
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "PMI_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_RANK",
    "FLUX_TASK_LOCAL_ID",
    "PALS_LOCAL_RANKID",
)

# Starters that start several processes but do not set RANK: (their name, their number of processes).
_OTHER_STARTERS = (
    ("srun", "SLURM_STEP_NUM_TASKS"),
    ("mpirun", "OMPI_COMM_WORLD_SIZE"),
    ("mpirun", "PMI_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_SIZE"),
    ("jsrun", "JSM_NAMESPACE_SIZE"),
    ("flux run", "FLUX_JOB_SIZE"),
)

# What `accelerate launch` sets if it is to do what DeepSpeed does here, or what is refused as a flag too.
_ACCELERATE = {
    "ACCELERATE_USE_FSDP": "--use_fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
    "ACCELERATE_USE_CP": "--use_cp",
}
# What accelerate reads as yes and as no; it ends in a traceback at anything else.
_YES, _NO = ("y", "yes", "t", "true", "on", "1"), ("n", "no", "f", "false", "off", "0", "")
_SWITCHES = (*_ACCELERATE, "ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_CPU_AFFINITY", "FORK_LAUNCHED")

# Whole numbers that libraries read -> the least that they take.
_NUMBERS = {
    "OMP_NUM_THREADS": 1,
    "DEEPSPEED_TIMEOUT": 1,
    "TORCH_DIST_INIT_BARRIER": 0,
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": 0,
    "HF_HUB_ETAG_TIMEOUT": 0,
    "HF_HUB_DOWNLOAD_TIMEOUT": 0,
}
_COMPILERS = ("", "no", "eager")
_PRECISIONS = ("", "no", "bf16", "fp16")

# What accelerate divides: copies of the model, its states, matrices, and rows in two ways.
_PARALLELISM = ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")

# Nobody else comes to a process that is alone, so that torch may take the port that is free when it listens. One that
# is looked for before that can be another process's by then: imports take seconds.
ANY_PORT = "0"

_START = "start with deepspeed or torchrun"


def complete_launch_environment() -> None:
    """Complete the variables of ranks in os.environ. Without RANK, this process becomes rank 0 of 1.

    Raises:
        UserError: some of them are missing or contradict each other, or accelerate was told to divide the model.
    """
    _refuse_unreadable()
    _refuse_parallelism()
    _refuse_other_frameworks()

    # An empty variable is one that a job's template did not fill in.
    for name in RANK_VARIABLES:
        if os.environ.get(name, "x").strip() == "":
            del os.environ[name]

    if "RANK" not in os.environ:
        _refuse_several_without_rank()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=ANY_PORT)
        return

    # A launcher has named ranks.
    rank, size = _number("RANK"), _number("WORLD_SIZE", least=1)
    if rank >= size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE {size}: ranks are 0 to {size - 1}")
    _complete_master(size)
    _complete_local_rank(rank, size)


def require_working_folder() -> None:
    """Raise UserError if the folder that this process runs in has been removed: libraries cannot be loaded there."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the folder that this command runs in is not there any more ({error.strerror}): cd to another one"
        ) from None


def require_readable_files() -> None:
    """Raise UserError if Python reads text as ASCII: PyTorch cannot read files of its own then."""
    encoding = locale.getpreferredencoding(False)
    if codecs.lookup(encoding).name == "ascii":
        raise UserError(
            f"this locale's encoding is {encoding}, in which PyTorch cannot read its own files: set PYTHONUTF8=1, or "
            "unset PYTHONUTF8 and set LC_ALL=C.UTF-8"
        )


def require_plain_warnings() -> None:
    """Raise UserError if every module's warnings are errors: those of libraries would end a run at any point."""
    for option in sys.warnoptions:
        action, _, rest = option.partition(":")
        if action.strip() == "error" and not any(part.strip() for part in rest.split(":")[2:]):
            raise UserError(
                f"warnings of all libraries are errors here ({option[:80]!r}), which would end a run at any point: "
                "unset PYTHONWARNINGS, drop -W, or name the module that it is for"
            )


def require_accelerator() -> None:
    """Raise UserError if DS_ACCELERATOR names a device that DeepSpeed does not know, or that this machine lacks.

    Cost: nothing without the variable or with cpu; else the import of DeepSpeed.
    """
    asked = os.environ.get("DS_ACCELERATOR", "")
    if asked in ("", "cpu"):
        return
    try:
        from deepspeed.accelerator import get_accelerator

        is_there = get_accelerator().is_available()
    except (ValueError, ImportError, AssertionError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"DS_ACCELERATOR is {asked[:80]!r} ({reason}): unset it, or set it to cpu") from error
    if not is_there:
        raise UserError(
            f"DS_ACCELERATOR is {asked[:80]!r}, which this machine does not have: unset it, or set it to cpu"
        )


def _refuse_unreadable() -> None:
    """Raise UserError for what libraries cannot read: they end in a traceback, or do not say which variable it is."""
    for name, least in _NUMBERS.items():
        text = os.environ.get(name, "").strip()
        if not text:
            os.environ.pop(name, None)  # set to nothing: a job's template did not fill it in
        elif not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
            raise UserError(f"{name} is {text[:80]!r}, expected a whole number of at least {least}")
    for name in _SWITCHES:
        text = os.environ.get(name, "").strip()
        if text.lower() not in (*_YES, *_NO):
            raise UserError(f"{name} is {text[:80]!r}, expected true or false")
    device = os.environ.get("ACCELERATE_TORCH_DEVICE", "")
    if device:
        raise UserError(f"ACCELERATE_TORCH_DEVICE is {device[:80]!r}: DeepSpeed chooses the device here; unset it")


def _refuse_parallelism() -> None:
    """Raise UserError if `accelerate launch` was told to divide the model or its rows: here ranks divide the batch."""
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").strip().lower() not in _YES:
        return
    for kind in _PARALLELISM:
        name = f"PARALLELISM_CONFIG_{kind}_SIZE"
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"{name} is {os.environ[name][:80]!r} (accelerate launch --parallelism_config_{kind.lower()}_size): "
                "DeepSpeed divides the model here, and each rank has whole rows; leave it out"
            )


def _refuse_other_frameworks() -> None:
    """Raise UserError if `accelerate launch` was told to compile the model, or to train it by other means."""
    start = "leave it out of accelerate's flags and configuration (accelerate config)"
    for name, flag in _ACCELERATE.items():
        if os.environ.get(name, "").strip().lower() in _YES:
            raise UserError(f"{name} is set (accelerate launch {flag}): DeepSpeed trains here; {start}")
    compiler = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if compiler.lower() not in _COMPILERS:
        raise UserError(
            f"ACCELERATE_DYNAMO_BACKEND is {compiler[:80]!r} (accelerate launch --dynamo_backend): a compiled backward "
            f"pass is not proven with sampled gradients; {start}"
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision.lower() not in _PRECISIONS:
        raise UserError(
            f"ACCELERATE_MIXED_PRECISION is {precision[:80]!r} (accelerate launch --mixed_precision), expected no, "
            "bf16 or fp16; the model's files, or --bf16 and --fp16, say what is trained in"
        )


def _complete_master(size: int) -> None:
    if size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", ANY_PORT)
    if "MASTER_ADDR" not in os.environ:
        raise UserError(f"RANK and WORLD_SIZE are set, but MASTER_ADDR is not: {_START}, or set it to rank 0's machine")
    port = _number("MASTER_PORT", least=0 if size == 1 else 1)
    if port > 65535:
        raise UserError(f"MASTER_PORT is {port}, expected a port of at most 65535")
    # Among several machines a name may become known later, and the processes wait for it.
    address = os.environ["MASTER_ADDR"]
    if size == 1 and not _is_known(address):
        raise UserError(f"MASTER_ADDR is {address[:80]!r}, which this machine does not know: unset it for one process")


def _complete_local_rank(rank: int, size: int) -> None:
    """Set LOCAL_RANK if it is missing: Kubernetes' PyTorchJob, for one, starts one process per pod and names none."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        if name in os.environ:
            _number(name, least=1)
    if "LOCAL_RANK" not in os.environ:
        others = (os.environ[name] for name in _LOCAL_RANKS if os.environ.get(name))
        on_this_machine = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
        os.environ["LOCAL_RANK"] = next(others, str(rank % int(on_this_machine)) if on_this_machine else "0")
    local = _number("LOCAL_RANK")
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        here = _number(name, least=1) if name in os.environ else size
        if here > size:
            raise UserError(f"{name} is {here}, but WORLD_SIZE {size}: a machine has no more ranks than all of them")
        if here <= local < size:
            raise UserError(f"LOCAL_RANK is {local}, but {name} {here}: ranks on a machine are 0 to {here - 1}")
    if local >= size:
        raise UserError(f"LOCAL_RANK is {local}, but WORLD_SIZE {size}: a machine has no more ranks than all of them")


def _refuse_several_without_rank() -> None:
    if "WORLD_SIZE" in os.environ and _number("WORLD_SIZE", least=1) > 1:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but RANK is not set: {_START}, or unset WORLD_SIZE")
    for starter, name in _OTHER_STARTERS:
        started = os.environ.get(name, "1")
        if started.isdecimal() and len(started) < 12 and int(started) > 1:
            raise UserError(
                f"{starter} has started {os.environ[name]} processes ({name}), but RANK is not set, so that each would "
                f"be a run of its own: {_START}, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
            )


def _is_known(address: str) -> bool:
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError):
        return False
    return True


def _number(name: str, least: int = 0) -> int:
    text = os.environ.get(name)
    if text is None:
        raise UserError(f"RANK is set, but {name} is not: {_START}, or unset RANK for one process")
    if not (text.isascii() and text.strip().isdigit() and len(text) < 12 and int(text) >= least):
        raise UserError(f"{name} is {text[:80]!r}, expected a whole number of at least {least}")
    return int(text)
