"""What all launch scripts share: environment for one process, quiet logs, errors as one line and exit code 2."""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from piece_ds.runtime.blamed_variable import why_environment
from piece_ds.runtime.compile_lock import wait_with_a_limit
from piece_ds.runtime.deterministic import set_cublas_workspace
from piece_ds.runtime.errors import MachineError, UserError, bad_name
from piece_ds.runtime.garbage import freeze_imports
from piece_ds.runtime.launch_environment import (
    complete_launch_environment,
    require_accelerator,
    require_plain_warnings,
    require_readable_files,
)
from piece_ds.runtime.rank_status import claim, is_gone, is_late, missing_ranks
from piece_ds.runtime.signals import STOP_CODE, Preempted
from piece_ds.runtime.streams import keep_streams
from piece_ds.runtime.text import PrintableFormatter, printable

# How long other ranks wait for rank 0 to print an error that all of them have, before they print it themselves.
OTHER_RANKS_WAIT_SECONDS = 5.0

DEFAULT_TIMEOUT_SECONDS = 1800.0  # transformers' default of --ddp_timeout


def run_command(main: Callable[[list[str]], None], words: list[str] | None = None) -> NoReturn:
    """Run main(argv) as a program, and exit with exit_code().

    deepspeed's launcher adds --local_rank=N to the arguments. It is dropped: ranks come from the environment.

    Args:
        main: the program.
        words: its command line without its name; None means that of this process.
    """
    keep_streams()
    given = sys.argv[1:] if words is None else words
    argv = [a for a in given if not a.startswith("--local_rank") and not a.startswith("--local-rank")]
    try:
        require_readable_files()
        require_plain_warnings()
        one_process_environment()
        require_accelerator()
        _own_programs_first()
        set_cublas_workspace()
        _quiet()
    except UserError as error:
        _say(f"error: {error}")
        _leave(2)
    except Exception as error:
        if not (reason := why_environment(error)):
            raise
        _say(f"error: {reason}")
        _leave(2)
    _leave(exit_code(main, argv))


def exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run main(argv) and return its exit code.

    A UserError prints one line on stderr and gives 2, a MachineError one line and 1. A run that a signal stopped prints
    one line and gives 75. Any other exception is a defect or a lost rank and gives 1.
    """
    try:
        main(argv)
    except UserError as error:
        _say_after_rank_0(f"error: {message_of(error)}")
        return 2
    except MachineError as error:
        _say_after_rank_0(f"error: {error}")
        return 1
    except Preempted as stop:
        # All ranks stop at the same point, so one line is enough.
        if int(os.environ["RANK"]) == 0:
            _say(str(stop))
        return STOP_CODE
    except Exception as error:
        if isinstance(error, OSError) and (line := bad_name(error)):
            _say_after_rank_0(f"error: {line}")
            return 2
        # Before ranks meet, nothing has been written.
        if not dist.is_initialized() and (reason := why_environment(error)):
            _say_after_rank_0(f"error: {reason}")
            return 2
        _say_failure(error)
        return 1
    return 0


def _say_failure(error: Exception) -> None:
    """Print one traceback per job: that of the first rank that failed by itself.

    A rank that failed because it lost another one prints a line. Nobody waits for the others: their collectives with
    this rank fail at once, and launchers end them.
    """
    own = os.environ["RANK"]
    if is_late(error):
        _say(f"error: {missing_ranks()}. What was finished is there; --ddp_timeout says how long ranks wait")
    elif is_gone(error):
        _say(f"error: rank {own} ends, since another rank has ended ({str(error).splitlines()[0][:120]})")
    elif claim("traceback") == 1:
        _say(f"rank {own} failed:")
        traceback.print_exception(error)
    else:
        _say(f"error: rank {own} failed too, see the traceback of the first: {type(error).__name__}: {error}")


def _say_after_rank_0(message: str) -> None:
    """Print a message at once on rank 0. Other ranks print it only if rank 0 has not ended them by then."""
    if int(os.environ["RANK"]) != 0:
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    _say(message)


def _say(message: str) -> None:
    print(printable(" ".join(message.split())), file=sys.stderr, flush=True)


def message_of(error: UserError) -> str:
    """Return an error's message. torch's traceback before it is dropped if it came from a worker of a DataLoader."""
    text = str(error)
    name = f"{UserError.__module__}.{UserError.__name__}: "
    if text.startswith("Caught UserError in DataLoader worker"):
        text = text.rpartition(name)[2]
    return text


def start_distributed(seconds: float | None = None) -> None:
    """Start torch.distributed through DeepSpeed, with the accelerator's backend; once per process.

    transformers would start it too. But with --use_cpu it does so without DeepSpeed, which then counts one rank.

    Args:
        seconds: how long a collective waits for other ranks, in this group and in all later ones. DeepSpeed makes some
            of those, and passes no timeout on. None means torch's defaults for them.
    Raises:
        UserError: the port that the ranks shall meet at is in use.
    """
    import deepspeed
    from torch.distributed import DistNetworkError, distributed_c10d

    timeout = timedelta(seconds=seconds or DEFAULT_TIMEOUT_SECONDS)
    if seconds is not None:
        distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    # On a CPU DeepSpeed compiles an extension here, for all-reduce in inference, which training never calls. It takes
    # half a minute on a new machine, under a lock file. A killed process leaves the file behind, and later ones wait.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    wait_with_a_limit()
    try:
        deepspeed.init_distributed(timeout=timeout)
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error) and "address already in use" not in str(error):
            raise
        raise UserError(
            f"MASTER_PORT {os.environ.get('MASTER_PORT')} is in use on this machine, by another job or one that "
            "has not ended yet: choose another (deepspeed --master_port, torchrun --master_port)"
        ) from error

    # What a run needs is imported, and no model is there yet: the time to set the imports apart.
    freeze_imports()


def one_process_environment() -> None:
    """Make this process rank 0 of 1 unless a launcher has named ranks. See complete_launch_environment()."""
    complete_launch_environment()


def without_mpi() -> None:
    """Let DeepSpeed start one process if no launcher has named ranks and there is no MPI to ask.

    Without the ranks' environment DeepSpeed asks mpi4py. A script started with plain python then ends in
    ModuleNotFoundError.
    """
    from deepspeed.comm import comm

    if getattr(comm.mpi_discovery, "asks_first", False):
        return
    ask_mpi = comm.mpi_discovery

    @wraps(ask_mpi)
    def discover(*args: Any, **kwargs: Any) -> None:
        if find_spec("mpi4py") is None:
            one_process_environment()
        else:
            ask_mpi(*args, **kwargs)

    discover.asks_first = True  # type: ignore[attr-defined]
    comm.mpi_discovery = discover


def _own_programs_first() -> None:
    """Let torch build extensions with this environment's ninja, even if the environment is not activated.

    Without ninja on the path, DeepSpeed's extensions do not build. If ninja changes between two runs they are built
    again, half a minute each time.
    """
    programs = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if programs not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (programs, path)))


def _quiet() -> None:
    """Show warnings and our own progress only on rank 0. On the CPU, divide threads among the ranks of this machine."""
    import torch
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    # Users cannot act on deprecations inside the libraries that we call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if int(os.environ["RANK"]) != 0:
        logging.getLogger().setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
        )
        num_threads = max(1, (os.cpu_count() or 1) // local_ranks)
        os.environ["OMP_NUM_THREADS"] = str(num_threads)
        torch.set_num_threads(num_threads)


def _leave(code: int) -> NoReturn:
    """Exit without waiting for peers that may never come."""
    if code == 0 and dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # A lost peer would block a clean shutdown, so leave at once.
    if code:
        os._exit(code)
    sys.exit(0)
