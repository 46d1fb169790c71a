"""Damaged files: refused in one line, or read as what they still say; never a crash, never something written."""

import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.readers import DAMAGES, READERS, made, mutated

from piece_ds.runtime.errors import UserError

# make test-faults sets it: seconds of mutations for each reader.
FUZZ_SECONDS = float(os.environ.get("PIECE_DS_FUZZ_SECONDS", "0.2"))
SEED = int(os.environ.get("PIECE_DS_SEED", "0"))

# What no reader can tell from a good file: a newline less at the end, rows less, weights without a checksum.
UNSEEN = {
    ("statistics-index", "without-its-last-byte"),
    ("seal", "without-its-last-byte"),
    ("jsonl", "half"),
    ("predictions", "without-its-last-byte"),
    ("predictions", "empty"),
    ("csv", "half"),
    ("csv", "without-its-last-byte"),
    ("model", "zeros-for-its-last-quarter"),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_good_file_is_read(tmp_path: Path, kind: str) -> None:
    made(READERS[kind], tmp_path / "f")
    READERS[kind].read(tmp_path / "f")


@pytest.mark.parametrize(
    ("kind", "damage"), [pair for pair in itertools.product(READERS, DAMAGES) if pair not in UNSEEN]
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path: Path, kind: str, damage: str) -> None:
    path = made(READERS[kind], tmp_path / "f")
    content = path.read_bytes()
    path.write_bytes(DAMAGES[damage](content))
    before = {file: file.read_bytes() for file in (tmp_path / "f").rglob("*")}
    with pytest.raises(UserError) as refusal:
        READERS[kind].read(tmp_path / "f")
    assert "\n" not in str(refusal.value).strip()
    assert len(str(refusal.value)) < 1000
    assert path.name in str(refusal.value)
    assert {file: file.read_bytes() for file in (tmp_path / "f").rglob("*")} == before


@pytest.mark.parametrize("kind", READERS)
def test_a_flipped_bit_anywhere_is_found_or_changes_nothing_that_is_checked(tmp_path: Path, kind: str) -> None:
    path = made(READERS[kind], tmp_path / "f")
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), max(1, 8 * len(content) // 97)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        passed = _reads(READERS[kind].read, tmp_path / "f")
        assert not (passed and READERS[kind].sealed), f"bit {bit}"


@pytest.mark.parametrize("kind", READERS)
def test_random_mutations_never_crash_a_reader(tmp_path: Path, kind: str) -> None:
    path = made(READERS[kind], tmp_path / "f")
    content, rng, num_tried = path.read_bytes(), random.Random(f"{SEED}-{kind}"), 0
    end = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end:
        data = mutated(content, rng)
        path.write_bytes(data)
        (tmp_path / "tried").write_bytes(data)  # what to read again where the next line raises
        _reads(READERS[kind].read, tmp_path / "f")
        num_tried += 1
    print(f"{kind}: {num_tried} mutations")
    assert num_tried > 0


def _reads(read: Callable[[Path], object], folder: Path) -> bool:
    """Whether the file was accepted; False where it was refused, in one line."""
    refusal = ""
    try:
        read(folder)
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal.strip()
    return not refusal


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    path = made(READERS["model-index"], tmp_path / "f")
    for name in ("../part.safetensors", str(tmp_path / "f" / "part.safetensors"), "deep/part.safetensors"):
        path.write_text(path.read_text().replace("part.safetensors", name))
        with pytest.raises(UserError, match="expected the name of a safetensors file in the same folder"):
            READERS["model-index"].read(tmp_path / "f")
        made(READERS["model-index"], tmp_path / "f")
