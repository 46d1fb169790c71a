"""A model told from another by its files, without reading all of them."""

import hashlib
from pathlib import Path

import transformers
from transformers.utils import cached_file

# Of a file of weights: its size, its beginning (names and shapes) and this many places in it are compared. Another
# checkpoint differs nearly everywhere; to find one damaged byte, all of it would have to be read once more.
NUM_SAMPLES, SAMPLE_BYTES = 64, 1 << 16


def weights_digests(source: str) -> dict[str, str]:
    """Return file of weights -> a short digest of samples of it; empty if the files are not here.

    Args:
        source: a model folder, or a name whose files the hub's cache holds.
    """
    folder = _folder(source)
    if folder is None:
        return {}
    files = sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    return {path.name: _sampled(path) for path in files}


def model_digest(source: str) -> str | None:
    """Return one short digest of configuration and weights together; None if the files are not here."""
    digests = weights_digests(source)
    folder = _folder(source)
    if folder is None or not digests:
        return None
    digest = hashlib.sha256((folder / transformers.utils.CONFIG_NAME).read_bytes())
    digest.update(repr(sorted(digests.items())).encode())
    return digest.hexdigest()[:16]


def _folder(source: str) -> Path | None:
    if Path(source).is_dir():
        return Path(source)
    try:
        config = cached_file(source, transformers.utils.CONFIG_NAME)
    except OSError:
        return None
    return Path(config).parent


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(number * max(0, size - SAMPLE_BYTES) // max(1, NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
