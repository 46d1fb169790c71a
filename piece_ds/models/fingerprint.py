"""Digests that tell one model from another by its files, without reading all of them."""

import hashlib
from pathlib import Path

import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

# A file of weights is compared by its size, its beginning (names and shapes) and this many places in it. Another
# checkpoint differs nearly everywhere. One damaged byte is not found: that would take reading the whole file.
NUM_SAMPLES, SAMPLE_BYTES = 64, 1 << 16


def weights_digests(source: str) -> dict[str, str]:
    """Return weight file -> a short digest of samples of it; empty if the files are not on this machine.

    Args:
        source: a model folder, or a Hub id whose files are in the Hub's cache.
    Cost: reads 4 MiB of each file.
    """
    folder = files_folder(source)
    if folder is None:
        return {}
    files = sorted(path for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    return {path.name: _sampled(path) for path in files}


def model_digest(source: str) -> str | None:
    """Return one short digest of configuration and weights; None if the files are not on this machine."""
    digests = weights_digests(source)
    folder = files_folder(source)
    if folder is None or not digests:
        return None
    digest = hashlib.sha256((folder / transformers.utils.CONFIG_NAME).read_bytes())
    digest.update(repr(sorted(digests.items())).encode())
    return digest.hexdigest()[:16]


def files_folder(source: str) -> Path | None:
    """Return the folder that holds a model's files: source itself, or its place in the Hub's cache; None without."""
    if Path(source).exists():
        return Path(source) if Path(source).is_dir() else None
    try:
        found = try_to_load_from_cache(source, transformers.utils.CONFIG_NAME)
    except HFValidationError:  # neither a folder nor an id
        return None
    return Path(found).parent if isinstance(found, str) else None


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    # The samples include the first and the last bytes of the file.
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(number * max(0, size - SAMPLE_BYTES) // max(1, NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
