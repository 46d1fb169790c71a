"""Every reader of files that a user may hand over, with a good file for it, and ways to damage a file.

A reader may accept what is left, or refuse it with a UserError; anything else is a defect. One that keeps checksums
must refuse whatever is not the file it wrote.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from torch import nn

from piece_ds.checkpoint.delta_file import load_previous, save_delta
from piece_ds.checkpoint.delta_parts import write_parts
from piece_ds.checkpoint.manifest import verify_manifest, write_manifest
from piece_ds.checkpoint.mask_file import load_mask, save_mask
from piece_ds.checkpoint.selected_file import load_selected_state, save_selected_state
from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.data.files import load_rows
from piece_ds.deltas.compose import compose
from piece_ds.deltas.delta import open_delta
from piece_ds.deltas.folder import open_folder
from piece_ds.evaluation.predictions import read_predictions, write_predictions
from piece_ds.models.layout import layout_of
from piece_ds.models.stored_names import stored_names
from piece_ds.report.results import RunResults, read_results
from piece_ds.state.mask import Mask
from piece_ds.state.statistics import GradientStats
from piece_ds.zero.selected_state import SelectedState
from piece_ds.zero.weights import read_selected

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
LAYOUT = layout_of(MODEL)
INDEX = {"0.weight": torch.tensor([0, 7, 34]), "1.bias": torch.tensor([2])}
MASK = Mask(LAYOUT, INDEX, 4, "piece-s", 0.1)
ROWS = [{"prompt": f"what is {i}?", "answer": f'it is, "{i}"\n'} for i in range(4)]


@dataclass(frozen=True)
class Reader:
    """How a kind of file is made and read.

    Attributes:
        file: the file to damage, in a folder.
        make: write a good one, given the folder.
        read: read it, given the folder.
        sealed: whether it carries a checksum of all its content, so that no damage may pass.
    """

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    sealed: bool = False


def _delta(folder: Path) -> None:
    save_delta(folder / "delta.safetensors", MODEL, MASK, read_selected(MODEL, MASK))


def _delta_of_gaps(folder: Path) -> None:
    """A delta of version 2: gaps, and a parameter whose values are left out."""
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    previous = read_selected(model, MASK)
    with torch.no_grad():
        model[1].bias[2] = 0
    save_delta(folder / "plain", model, MASK, previous)
    compose([open_delta(folder / "plain")], folder / "delta.safetensors", coding="gaps")


def packed_delta(path: Path) -> None:
    """A delta of version 3: gaps, and packed values; of one parameter the new ones are left out."""
    index, previous = torch.arange(0, 800, 2), torch.linspace(0.01, 0.02, 400)
    parts = {
        "0.weight": {"indices": index, "values": previous * 1.001, "previous": previous},
        "1.weight": {"indices": index, "values": torch.zeros(400), "previous": previous},
    }
    shapes = {name: [40, 40] for name in parts}
    metadata = {"selected": "800", "total": "3200", "shapes": json.dumps(shapes)}
    write_parts(path, parts, dict.fromkeys(parts, 1600), metadata, "smallest")
    assert open_delta(path).metadata["version"] == "3"


def _statistics(folder: Path) -> None:
    sums = torch.arange(LAYOUT.num_owned, dtype=torch.float32)
    save_statistics(folder, GradientStats(LAYOUT, sums.square(), sums, 9, 2), {"rows": 3})


def _selected(folder: Path) -> None:
    parts = {name: torch.rand(4) for name in ("values", "exp_avg", "exp_avg_sq")}
    save_selected_state(folder / "selected.safetensors", MASK, SelectedState(parts, 3, {"global_steps": 3}))


def _model_index(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = {name: param.detach().clone() for name, param in MODEL.named_parameters()}
    save_file(tensors, folder / "part.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _results(folder: Path) -> None:
    from piece_ds.evaluation.matrix import ResultMatrix

    results = RunResults(name="r", method="piece-s", ratio=0.1, matrix=ResultMatrix(("a", "b"), ("accuracy", "loss")))
    (folder / "results.json").write_text(json.dumps(results.to_json()))


def _parquet(folder: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")


def _csv(folder: Path) -> None:
    lines = ["prompt,answer", *('"{}","{}"'.format(*(v.replace('"', '""') for v in row.values())) for row in ROWS)]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")


def _known(folder: Path) -> object:
    return open_folder(folder, LAYOUT, stored_names(MODEL))


def _seal(folder: Path) -> None:
    (folder / "one.bin").write_bytes(bytes(range(200)))
    write_manifest(folder)


READERS: dict[str, Reader] = {
    "mask": Reader(
        "mask.safetensors",
        lambda f: save_mask(f / "mask.safetensors", MASK),
        lambda f: load_mask(f / "mask.safetensors", LAYOUT),
    ),
    "delta": Reader("delta.safetensors", _delta, lambda f: open_delta(f / "delta.safetensors")),
    "delta-2": Reader("delta.safetensors", _delta_of_gaps, lambda f: open_delta(f / "delta.safetensors")),
    "delta-3": Reader(
        "delta.safetensors",
        lambda f: packed_delta(f / "delta.safetensors"),
        lambda f: open_delta(f / "delta.safetensors"),
    ),
    "previous": Reader("delta.safetensors", _delta, lambda f: load_previous(f / "delta.safetensors", MASK)),
    "statistics": Reader(
        "statistics-00000-of-00001.safetensors", _statistics, lambda f: load_statistics(f, LAYOUT, needs_sum=True)
    ),
    "statistics-index": Reader("statistics.json", _statistics, lambda f: load_statistics(f, LAYOUT, needs_sum=True)),
    "selected": Reader(
        "selected.safetensors", _selected, lambda f: load_selected_state(f / "selected.safetensors", MASK)
    ),
    "sealed-file": Reader("one.bin", _seal, verify_manifest, sealed=True),
    "seal": Reader("SHA256SUMS", _seal, verify_manifest),
    "model": Reader("part.safetensors", _model_index, _known),
    "model-index": Reader("model.safetensors.index.json", _model_index, _known),
    "results": Reader("results.json", _results, lambda f: read_results(f / "results.json")),
    "predictions": Reader(
        "p.jsonl",
        lambda f: write_predictions(f / "p.jsonl", ["a"], ["b"], ["c"]),
        lambda f: read_predictions(f / "p.jsonl"),
    ),
    "json": Reader(
        "rows.json", lambda f: (f / "rows.json").write_text(json.dumps(ROWS)), lambda f: load_rows(str(f / "rows.json"))
    ),
    "jsonl": Reader(
        "rows.jsonl",
        lambda f: (f / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS))),
        lambda f: load_rows(str(f / "rows.jsonl")),
    ),
    "csv": Reader("rows.csv", _csv, lambda f: load_rows(str(f / "rows.csv"))),
    "parquet": Reader("rows.parquet", _parquet, lambda f: load_rows(str(f / "rows.parquet"))),
}


def made(reader: Reader, folder: Path) -> Path:
    """folder, emptied, with a good file of reader in it; returns that file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    reader.make(folder)
    return folder / reader.file


# Damage that a file system, a copy or a hand does.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "without-its-last-byte": lambda content: content[:-1],
    "zeros-for-its-last-quarter": lambda content: content[: -(len(content) // 4)] + bytes(len(content) // 4),
    "another-file": lambda content: b"\x7fELF" + bytes(60),
    "deep-json": lambda content: b"[" * 200_000,
    "long-header": lambda content: struct.pack("<Q", 2**62) + content[8:],
}


def mutated(content: bytes, rng: random.Random) -> bytes:
    """content after one to four random edits: bits, bytes, cuts, repeats, digits, and numbers that readers trust."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice([1, 2, 8, 64, len(data)])]
        elif kind == 3:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        elif kind == 4:
            data[at:at] = rng.choice(
                [b"null", b"-1", b"1e999", b"{}", b"[]", b'"', b"\\u0000", b"\xff\xfe", b"../", b"0"]
            )
        elif kind == 5:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789-")
        else:
            data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 2**31, 2**63, rng.getrandbits(64)]))
    return bytes(data)
