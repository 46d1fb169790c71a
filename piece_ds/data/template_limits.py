"""Run a chat template within limits: it is a program that came with a model, and may loop for ever or fill the memory.

jinja's sandbox bounds one range, but not loops within loops, powers or repeated texts.
"""

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from piece_ds.runtime.errors import UserError

# Templates of published models take some milliseconds for a row. Both are of this process alone, so that a busy machine
# refuses nothing.
LIMIT_SECONDS = 10.0  # of computing
LIMIT_BYTES = 2 << 30  # that may be added while it runs

_Result = TypeVar("_Result")


class _RanTooLong(BaseException):
    """A template is still at work after LIMIT_SECONDS. No Exception: jinja swallows those while it compiles."""


def rendered(render: Callable[[], _Result], where: str) -> _Result:
    """Return what render() gives: what a chat template makes of one row.

    Args:
        render: calls the template.
        where: file and row, for the message.
    Raises:
        UserError: the template is broken, needs a variable, refuses the row, or passes a limit.
    Cost: some microseconds besides render().
    """
    try:
        with _limits():
            return render()
    except _RanTooLong as error:
        reason = str(error)
    except MemoryError:
        reason = f"it takes more than {LIMIT_BYTES >> 30} GiB of memory"
    except Exception as error:  # anything may come out of a program of the model's makers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(
        f"{where}: the tokenizer's chat template cannot render the row ({reason}); mend the template or the row, or "
        "use --chat_template false where rows are one question and one answer"
    )


@contextmanager
def _limits() -> Iterator[None]:
    """Raise inside once the time or the memory is used up. Other threads than the main one have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # Time: a timer that runs while this process computes.
    def stop(*_: Any) -> None:
        raise _RanTooLong(f"it has computed for {LIMIT_SECONDS:g} s without an end")

    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS, 1.0)

    # Memory: what is there now and some more, unless less is allowed already.
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = [limit for limit in (soft, hard, _address_space() + LIMIT_BYTES) if limit != resource.RLIM_INFINITY]
    try:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (min(most), hard))
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, handler)


def _address_space() -> int:
    """Return the bytes that this process has mapped; more than any machine has if the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 1 << 62
