"""The name of a repository on the Hub, and what goes wrong on the way to it, as one line.

huggingface_hub explains a failure in many lines, and raises errors of the HTTP library, of the system and of Python. A
command says one line: what was not done, why, and what to do.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from piece_ds.runtime.errors import MachineError, UserError

_SCHEME = "hf://"
# The root of all errors of the HTTP library that this version of huggingface_hub uses: httpx, or its successor.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
# Newer versions alone have it; most errors of the Hub's other storage protocol, Xet, are OSErrors.
_XET: tuple[type[Exception], ...] = tuple(filter(None, [getattr(huggingface_hub.errors, "XetDownloadError", None)]))
# ValueError: a refused card, an answer that is not JSON. LookupError and TypeError: JSON that no Hub sends.
_FAILURES: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    EntryNotFoundError,
    _HTTP_ERROR,
    *_XET,
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
FORBIDDEN, UNAUTHORIZED, CHANGED = 403, 401, (409, 412)


@dataclass(frozen=True)
class Remote:
    """A repository of models on the Hub.

    Attributes:
        repo_id: user/name.
        revision: a branch, tag or commit; None for the main branch.
        token: that is used there; None means the one that huggingface_hub finds.
    """

    repo_id: str
    revision: str | None = None
    token: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.repo_id}" + (f" at {self.revision}" if self.revision else "")


def parse_remote(address: str, revision: str | None = None, token: str | None = None) -> Remote:
    """Return the repository that hf://user/name means.

    Raises:
        UserError: address has another form, or revision is empty.
    """
    repo_id = address.removeprefix(_SCHEME)
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        repo_id = ""
    if not address.startswith(_SCHEME) or repo_id.count("/") != 1:
        raise UserError(f"{address[:200]!r}: expected a repository of the Hub as hf://user/name")
    if revision is not None and not revision.strip():
        raise UserError("--revision is empty: give a branch, a tag or a commit, or leave it out")
    return Remote(repo_id, revision, token)


@contextmanager
def said_in_one_line(what: str, remote: Remote) -> Iterator[None]:
    """Turn every failure of the Hub, the network or the token into a UserError: "nothing was {what}: ...".

    Raises:
        MachineError: the disk is full or fails.
    """
    try:
        yield
    except UserError:
        raise
    except _FAILURES as error:
        if getattr(error, "errno", None) in _DISK:
            raise MachineError(f"nothing was {what}: {_shortened(error)}; free or mend the disk") from error
        raise UserError(f"nothing was {what}: {_reason(error, remote)}") from None


def _reason(error: Exception, remote: Remote) -> str:
    """Return what went wrong, and what to do, without the many lines of huggingface_hub."""
    wraps = isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception)
    cause = error.__cause__ if wraps and error.__cause__ is not None else error
    status = status_of(cause)
    offline = huggingface_hub.constants.HF_HUB_OFFLINE or isinstance(cause, OfflineModeIsEnabled)
    if offline:
        return f"the Hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE; unset it to reach {remote}"
    if isinstance(cause, RevisionNotFoundError):
        return f"hf://{remote.repo_id} has no revision {str(remote.revision)[:100]!r}; give one that it has"
    if isinstance(cause, EntryNotFoundError):
        return f"{remote} lacks a file ({_shortened(cause)}): it was not written by piece_ds delta push"
    if status == UNAUTHORIZED or (isinstance(cause, RepositoryNotFoundError) and status != FORBIDDEN):
        # The Hub does not tell a missing repository from one that must not be seen.
        return f"there is no repository {remote}, or no valid token that may see it; check the name and HF_TOKEN"
    if status == FORBIDDEN:
        return f"this token has no permission for {remote} (HTTP {status}); use one that has"
    if status in CHANGED:
        return f"{remote} was changed by another commit meanwhile (HTTP {status}); run the command again"
    if isinstance(cause, HfHubHTTPError):
        return f"{huggingface_hub.constants.ENDPOINT} refused {remote}: {_shortened(cause)}"
    if isinstance(cause, _HTTP_ERROR):
        endpoint = huggingface_hub.constants.ENDPOINT
        return f"{endpoint} cannot be reached ({_shortened(cause)}); check the network, a proxy, or HF_ENDPOINT"
    return f"{remote}: {_shortened(cause)}"


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error is about; None if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _shortened(error: BaseException) -> str:
    """Return the start of an error's text, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
