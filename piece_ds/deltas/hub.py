"""Push task deltas to a repository of the Hub, and pull them from one, through huggingface_hub.

A push is one commit: all files are there, or none. A pull reads one commit, compares every file with the manifest, and
gives its folder a name only when all is there. Whatever goes wrong on the way becomes one UserError of one line.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id

from piece_ds.deltas.delta import Delta
from piece_ds.deltas.published import (
    CARD_NAME,
    MANIFEST_NAME,
    Base,
    Published,
    is_own_path,
    read_manifest,
    require_as_promised,
)
from piece_ds.deltas.remote import FORBIDDEN, Remote, said_in_one_line, status_of
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_folder

_PULL_REQUEST = re.compile(r"refs/pr/\d+")


def push_deltas(
    remote: Remote,
    published: Published,
    card: str,
    figures: Mapping[str, bytes],
    *,
    private: bool = False,
    create_pr: bool = False,
) -> str:
    """Commit deltas, masks, figures, card and manifest to a repository, which is made if it is missing.

    Deltas, masks and figures of an earlier push that are not pushed again are removed by the same commit; the files of
    others stay. A commit that somebody else makes meanwhile is not overwritten.

    Args:
        remote: where to; its revision is a branch, which is made if it is missing.
        published: the deltas and masks.
        card: the text of README.md.
        figures: path in the repository -> PNG bytes.
        private: make a private repository; one that is public already is refused.
        create_pr: open a pull request instead of changing the branch. The repository must exist.
    Returns:
        The address of the commit or of the pull request.
    Raises:
        UserError: see the module. Nothing was committed.
    """
    api = HfApi(token=remote.token)
    manifest = published.manifest(figures)

    # Find the repository and its newest commit, or make it.
    require_token(remote)
    with said_in_one_line("pushed", remote):
        info = _require_repository(api, remote, private=private, create_pr=create_pr)

    # Commit everything at once.
    contents: dict[str, Path | bytes] = {**published.files, **figures}
    contents |= {MANIFEST_NAME: manifest.to_bytes(), CARD_NAME: card.encode()}
    stale = [file.rfilename for file in info.siblings or [] if file.rfilename not in contents]
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationAdd(name, str(part) if isinstance(part, Path) else part) for name, part in contents.items()),
        *(CommitOperationDelete(name) for name in stale if is_own_path(name)),
    ]
    with said_in_one_line("pushed", remote):
        commit = api.create_commit(
            remote.repo_id,
            operations,
            commit_message=f"{len(published.deltas)} task deltas (piece_ds)",
            revision=remote.revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    return str(commit.pr_url or commit.commit_url)


def pull_deltas(remote: Remote, output: Path, check: Callable[[list[Delta]], object] | None = None) -> list[Delta]:
    """Bring the deltas, masks and figures of a repository into a folder, which appears whole or not at all.

    Args:
        remote: where from. One commit is read, whatever is pushed meanwhile.
        output: a path where nothing exists yet, or an empty folder.
        check: called with the deltas before the folder gets its name; it raises to refuse them.
    Returns:
        The deltas in output, in order.
    Raises:
        UserError: see the module; or a file or the base is not what the manifest says. Nothing was written.
    Disk: the files, once, in output's file system.
    """
    require_empty(output)
    api = HfApi()
    with said_in_one_line("pulled", remote):
        sha = api.model_info(remote.repo_id, revision=remote.revision).sha

    # Fetch beside the output, so that what was checked can be renamed.
    near = next(parent for parent in output.absolute().parents if parent.exists())
    try:
        scratch = tempfile.TemporaryDirectory(dir=near, prefix=".piece_ds-pull-")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}): give another path") from None
    with scratch as folder:
        fetched = Path(folder)
        with said_in_one_line("pulled", remote):
            _download(api, remote, sha, MANIFEST_NAME, fetched)
        manifest = read_manifest(fetched / MANIFEST_NAME, str(remote))
        with said_in_one_line("pulled", remote):
            for name in manifest.files:
                _download(api, remote, sha, name, fetched)
        deltas = require_as_promised(fetched, manifest, str(remote))
        if check is not None:
            check(deltas)

        # Everything is as promised: give it its name.
        def move(temporary: Path) -> None:
            for name in (*manifest.files, MANIFEST_NAME):
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(fetched / name, temporary / name)

        write_folder(output, move)
    return [replace(delta, path=output / name) for name, delta in zip(manifest.deltas, deltas, strict=True)]


def own_name(remote: Remote) -> str:
    """Return the name of the token's owner. Raise UserError if there is no token, or none that is valid."""
    require_token(remote)
    with said_in_one_line("pushed", remote):
        return str(HfApi(token=remote.token).whoami()["name"])


def known_base(base: Base, *, is_given: bool) -> Base:
    """Return base with the licence that its repository names; without a name if there is no such repository.

    A run notes its base as the user gave it: a Hub id, or a relative folder, which looks the same.

    Args:
        base: with the name of a repository.
        is_given: the user named it as one, so that it must exist.
    """
    remote = Remote(str(base.name), base.revision)
    unknown = base.model_copy(update={"name": None, "revision": None})
    try:
        validate_repo_id(remote.repo_id)
    except HFValidationError:
        if is_given:
            raise UserError(f"--base_model {remote.repo_id[:200]!r}: expected a Hub id, as user/name") from None
        return unknown
    with said_in_one_line("pushed", remote):
        try:
            info = HfApi().model_info(remote.repo_id, revision=base.revision)
        except RepositoryNotFoundError:
            if is_given:
                raise
            return unknown
    licence = getattr(info.card_data, "license", None)
    return base.model_copy(update={"licence": licence if isinstance(licence, str) else base.licence})


def require_token(remote: Remote) -> None:
    """Raise UserError if the Hub is switched off, or there is no token: nothing can be pushed."""
    with said_in_one_line("pushed", remote):
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise OfflineModeIsEnabled
        if remote.token is None and huggingface_hub.get_token() is None:
            raise UserError(
                f"nothing was pushed: there is no token for {remote}; set HF_TOKEN or run hf auth login, with a token "
                "that may write there"
            )


def require_empty(output: Path) -> None:
    """Raise UserError unless nothing is at output, or an empty folder."""
    try:
        taken = output.is_symlink() or (output.exists() and not (output.is_dir() and not any(output.iterdir())))
    except (OSError, ValueError) as error:  # names that are too long, or hold a zero byte; a folder without permission
        raise UserError(f"--output {str(output)[:200]!r} cannot be used ({error.__class__.__name__})") from None
    if taken:
        raise UserError(f"--output {output} exists already: give a path where nothing is, or an empty folder")
    if not output.name or output.resolve() == Path.cwd():  # it is replaced, and the shell would stay in the old one
        raise UserError(f"--output {output} is the folder that this command runs in: name one inside it")


def _require_repository(api: HfApi, remote: Remote, *, private: bool, create_pr: bool) -> ModelInfo:
    """Return what the Hub knows of the branch, after making the repository or the branch if they are missing."""
    try:
        info = api.model_info(remote.repo_id)
    except RepositoryNotFoundError as error:
        if create_pr or status_of(error) == FORBIDDEN:
            raise
        api.create_repo(remote.repo_id, private=private or None, exist_ok=True)
        info = api.model_info(remote.repo_id)
    if private and not info.private:
        raise UserError(f"{remote} is public: leave --private out, or push to another name")
    if remote.revision is None:
        return info
    try:
        return api.model_info(remote.repo_id, revision=remote.revision)
    except RevisionNotFoundError:
        if create_pr or _PULL_REQUEST.fullmatch(remote.revision):
            raise
        api.create_branch(remote.repo_id, branch=remote.revision, exist_ok=True)
        return api.model_info(remote.repo_id, revision=remote.revision)


def _download(api: HfApi, remote: Remote, sha: str | None, name: str, folder: Path) -> None:
    api.hf_hub_download(remote.repo_id, name, revision=sha, local_dir=folder)
