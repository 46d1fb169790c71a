"""Keep standard output and error usable whatever they lead to: what is printed must not end a run.

A reader may go (`| head`), a disk be full, a starter close them, an encoding lack letters. Results are in files too.
"""

import errno
import os
import sys
from typing import Any


class _Kept:
    """A text stream whose failures end nothing; otherwise the stream itself."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name
        self.reason: OSError | None = None

    def write(self, text: str) -> int:
        """Write text, or nowhere once that has failed."""
        try:
            return int(self._stream.write(text))
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or note that it failed."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lose(self, error: OSError) -> None:
        """Lead the stream to nowhere from here on, also for what is still in its buffer and for native libraries."""
        self.reason = self.reason or error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        # Whoever has closed a pipe knows.
        if self._name == "stdout" and error.errno != errno.EPIPE:
            print(
                f"standard output could not be written ({error.strerror}); what a run writes is whole", file=sys.stderr
            )


def keep_streams() -> None:
    """Make standard output and error of this process as the module says; for programs, and before anything is printed.

    Descriptors 0 to 2 that are closed are opened to nowhere: else the next file that is opened would get the number,
    and what a library prints would land in it.
    """
    if isinstance(sys.stdout, _Kept):
        return
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        if hasattr(stream, "reconfigure"):  # letters that the encoding lacks are shown by their numbers
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Kept(stream, name))


def lost_output() -> bool:
    """Return whether something printed was lost for another reason than a reader who has gone."""
    sys.stdout.flush()
    reason = getattr(sys.stdout, "reason", None)
    return reason is not None and reason.errno != errno.EPIPE
