"""mask.safetensors: the format byte by byte, read without piece_ds, and every damage refused in one line."""

import hashlib
import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from piece_ds.checkpoint.artifact import MASK, open_artifact, write_artifact
from piece_ds.checkpoint.mask_base import say_other_base, with_base
from piece_ds.checkpoint.mask_file import _positions, _smaller, check_mask_file, load_mask, mask_names, save_mask
from piece_ds.checkpoint.mask_statistics import read_index
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import MachineError, UserError
from piece_ds.state.mask import Mask
from piece_ds.state.partition import Layout


class Model(nn.Module):
    """Sizes of 1, 33, 8 and 0 elements after the last whole byte."""

    def __init__(self, wide: int = 11) -> None:
        super().__init__()
        self.first = nn.Linear(3, wide)
        self.second = nn.Linear(8, 1)

    @staticmethod
    def layout(wide: int = 11) -> Layout:
        return layout_of(Model(wide))


INDEX = {"first.weight": [0, 7, 8, 32], "second.weight": [3, 7], "second.bias": [0]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    index = {name: torch.tensor(positions) for name, positions in INDEX.items()}
    save_mask(tmp_path / "mask.safetensors", Mask(Model.layout(), index, 7, "piece-s", 0.13))
    return tmp_path / "mask.safetensors"


def header(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length])


def test_bits_are_packed_least_significant_first_with_zero_padding(path: Path) -> None:
    tensors = load_file(path)
    assert set(tensors) == set(INDEX)  # nothing selected, nothing stored
    for name, numel in (("first.weight", 33), ("second.weight", 8), ("second.bias", 1)):
        assert tensors[name].dtype == np.uint8
        flags = np.unpackbits(tensors[name], bitorder="little")
        assert flags.size == 8 * ((numel + 7) // 8)
        assert np.flatnonzero(flags).tolist() == INDEX[name]


def test_metadata_are_the_stated_strings(path: Path) -> None:
    metadata = header(path)["__metadata__"]
    assert {key: metadata[key] for key in ("format", "version", "method", "ratio", "selected", "total")} == {
        "format": "piece-mask",
        "version": "1",
        "method": "piece-s",
        "ratio": "0.13",
        "selected": "7",
        "total": "53",
    }
    assert json.loads(metadata["shapes"]) == {"first.weight": [11, 3], "second.weight": [1, 8], "second.bias": [1]}
    structure = [["first.weight", [11, 3]], ["first.bias", [11]], ["second.weight", [1, 8]], ["second.bias", [1]]]
    assert metadata["model_fingerprint"] == hashlib.sha256(json.dumps(structure).encode()).hexdigest()
    content = hashlib.sha256()
    for name, bits in sorted(load_file(path).items()):
        content.update(name.encode() + bits.tobytes())
    assert metadata["checksum"] == content.hexdigest()


def test_a_mask_comes_back_as_it_was(path: Path) -> None:
    mask = load_mask(path, Model.layout())
    assert {name: index.tolist() for name, index in mask.index.items()} == INDEX
    assert (mask.num_selected, mask.method, mask.ratio) == (7, "piece-s", 0.13)


def test_nothing_but_the_file_is_left_in_its_folder(path: Path) -> None:
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(tensors: Any, temporary: Path, metadata: Any) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("piece_ds.checkpoint.artifact.save_file", fail)
    with pytest.raises(MachineError, match="disk full"):
        save_mask(path, load_mask(path, Model.layout()))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_masks_of_other_programs_need_only_the_required_metadata(tmp_path: Path) -> None:
    metadata = {"format": "piece-mask", "version": "1"}
    save_file({"second.weight": np.array([0b10000001], dtype=np.uint8)}, tmp_path / "m", metadata)
    assert load_mask(tmp_path / "m", Model.layout()).index["second.weight"].tolist() == [0, 7]


def flip_a_bit_of_data(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def rewrite(change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> Callable[[Path], None]:
    """Damage that a checksum does not see: made with the file, not after it."""

    def apply(path: Path) -> None:
        metadata = header(path)["__metadata__"]
        tensors = load_file(path)
        metadata.pop("checksum", None)
        change(tensors, metadata)
        save_file(tensors, path, metadata)

    return apply


def set_tensor(name: str, values: list, dtype: type = np.uint8) -> Callable[[Path], None]:
    return rewrite(lambda tensors, _: tensors.update({name: np.array(values, dtype=dtype)}))


def set_metadata(**entries: str) -> Callable[[Path], None]:
    return rewrite(lambda _, metadata: metadata.update(entries))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or damaged"),
    "header-only": (lambda path: path.write_bytes(path.read_bytes()[:40]), "truncated or damaged"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "truncated or damaged"),
    "garbage": (lambda path: path.write_bytes(b"\xff" * 64), "truncated or damaged"),
    "bit-flip": (flip_a_bit_of_data, "checksum does not match"),
    "other-format": (set_metadata(format="something"), "expected 'piece-mask' version '1' or '2'"),
    "other-version": (set_metadata(version="3"), "version '3'"),
    "no-metadata": (lambda path: save_file(load_file(path), path), "format None"),
    "count": (set_metadata(selected="8"), "selects 7 elements, its metadata says 8"),
    "nothing-selected": (rewrite(lambda tensors, m: (tensors.clear(), m.update(selected="0"))), "selects 0 elements"),
    "shapes-no-json": (set_metadata(shapes="{"), "shapes: not JSON"),
    "shapes-no-object": (set_metadata(shapes="[1]"), "shapes: Input should be a valid dictionary"),
    "dtype": (set_tensor("second.weight", [1], np.int32), "expected 1-D uint8"),
    "dimensions": (set_tensor("second.weight", [[1]]), "expected 1-D uint8"),
    "length": (set_tensor("second.weight", [0b10001000, 0]), "needs 1"),
    "padding-bits": (set_tensor("second.bias", [0b10]), "past its last element"),
    "shape": (set_metadata(shapes=json.dumps({"first.weight": [3, 11]})), r"has shape \[3, 11\], this model's"),
    "unknown-name": (
        rewrite(lambda tensors, _: tensors.update({"second.wait": tensors.pop("second.weight")})),
        "names parameter 'second.wait'.*Did you mean 'second.weight'",
    ),
    "fingerprint": (set_metadata(model_fingerprint="0" * 64), "made for another model"),
    "other-total": (set_metadata(total="54"), "made for a model of 54 elements, this one has 53"),
    "total-below-its-shapes": (set_metadata(total="41"), "metadata contradict each other: total is 41"),
    "total-of-nothing": (set_metadata(total="0"), "metadata contradict each other: total is 0"),
    "total-no-digits": (set_metadata(total="53.0"), "total: .*expected digits alone"),
    "selected-no-digits": (set_metadata(selected="7.0"), "selected: .*expected digits alone"),
    "ratio-of-nothing": (set_metadata(ratio="0"), "ratio is 0, expected a share"),
    "ratio-in-percent": (set_metadata(ratio="13"), "ratio is 13, expected a share"),
    "ratio-negative": (set_metadata(ratio="-0.13"), "ratio is -0.13, expected a share"),
}


def test_a_ratio_far_from_what_is_selected_is_said_and_the_true_one_named(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is what was asked for: less may have been eligible, and other programs draw at random."""
    for ratio, used in (("0.13", 0.13), ("0.2", 0.2), ("0.9", 7 / 53), ("0.01", 7 / 53)):
        caplog.clear()
        set_metadata(ratio=ratio)(path)
        assert load_mask(path, Model.layout()).ratio == used
        assert ("selects 0.132 of the model" in caplog.text) == (used == 7 / 53)


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_mask_is_refused_in_one_line(path: Path, damage: str) -> None:
    apply, message = DAMAGE[damage]
    apply(path)
    with pytest.raises(UserError, match=message) as caught:
        load_mask(path, Model.layout())
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("wide", [10, 12])
def test_a_mask_of_another_shape_is_refused(path: Path, wide: int) -> None:
    with pytest.raises(UserError, match="another model"):
        load_mask(path, Model.layout(wide))


def test_a_whole_mask_passes_without_a_model(path: Path) -> None:
    assert check_mask_file(path)["method"] == "piece-s"


@pytest.mark.parametrize("version", ["1", "2"])
def test_both_versions_hold_the_same_mask(tmp_path: Path, version: str) -> None:
    index = {name: torch.tensor(positions) for name, positions in INDEX.items()}
    save_mask(tmp_path / "m", Mask(Model.layout(), index, 7, "piece-s", 0.13), version)
    tensors = load_file(tmp_path / "m")
    assert header(tmp_path / "m")["__metadata__"]["version"] == version
    if version == "2":
        assert {name: values.tolist() for name, values in tensors.items()} == {
            f"{name}.indices": positions for name, positions in INDEX.items()
        }
        assert all(values.dtype == np.int32 for values in tensors.values())
    assert {name: index.tolist() for name, index in load_mask(tmp_path / "m", Model.layout()).index.items()} == INDEX
    for rank in range(3):  # every rank takes its own range
        layout = replace(Model.layout(), rank=rank, num_ranks=3)
        with open_artifact(tmp_path / "m", MASK) as file:
            for info in layout.parameters:
                part = layout.partition(info)
                wanted = [i for i in INDEX.get(info.name, []) if part.start <= i < part.stop]
                if info.name in INDEX:
                    assert _positions(file, info.name, part.start, part.stop).tolist() == wanted
    assert mask_names(tmp_path / "m") == set(INDEX)
    assert read_index(tmp_path / "m")[0].keys() == INDEX.keys()


def test_the_smaller_version_is_written_where_it_saves_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"w": torch.arange(1000)}
    for numel, expected in ((8 << 20, "1"), ((8 << 20) + 9, "2")):  # a MiB of bits, and more
        assert _smaller(index, {"w": numel}) == expected
    monkeypatch.setattr("piece_ds.checkpoint.mask_file.BITS_ALWAYS_BELOW", 0)
    for num, expected in ((999, "2"), (1000, "1"), (1001, "1")):  # one element in 32
        assert _smaller({"w": torch.arange(num)}, {"w": 32_000}) == expected
    assert _smaller({"w": torch.arange(1000)}, {"w": 2**31 + 1}) == "2"


INDEX_DAMAGE: dict[str, tuple[torch.Tensor, str]] = {
    "unsorted": (torch.tensor([7, 3]), "not ascending"),
    "twice": (torch.tensor([3, 3]), "not ascending"),
    "negative": (torch.tensor([-1, 3]), "not ascending"),
    "past-the-end": (torch.tensor([3, 8]), "below 8"),
    "empty": (torch.tensor([], dtype=torch.int32), "not ascending"),
    "floats": (torch.tensor([3.0, 7.0]), "expected 1-D int32 or int64"),
    "bytes": (torch.tensor([3, 7], dtype=torch.uint8), "expected 1-D int32 or int64"),
    "0-dimensional": (torch.tensor(3), "with 0 dimensions"),
    "2-dimensional": (torch.tensor([[3, 7]]), "with 2 dimensions"),
}


@pytest.mark.parametrize("damage", list(INDEX_DAMAGE))
def test_indices_that_cannot_be_are_refused(tmp_path: Path, damage: str) -> None:
    index, message = INDEX_DAMAGE[damage]
    write_artifact(tmp_path / "m", MASK, {"second.weight.indices": index}, {}, "2")
    with pytest.raises(UserError, match=message):
        load_mask(tmp_path / "m", Model.layout())


def test_a_mask_names_the_weights_it_was_selected_on_and_others_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model, other = Model(), Model()
    index = {name: torch.tensor(positions) for name, positions in INDEX.items()}
    for version in ("1", "2"):
        mask = with_base(Mask(layout_of(model), index, 7, "piece-s", 0.13), model)
        save_mask(tmp_path / "m", mask, version)
        found = load_mask(tmp_path / "m", layout_of(other))
        assert found.base_fingerprint == mask.base_fingerprint
        say_other_base(found, model, "m")
        assert not caplog.records, "the same weights"
        say_other_base(found, other, "m")
        assert re.search(
            r"mask m was selected on other weights \(fingerprint \w{16}, this model's \w{16}\)", caplog.text
        )
        caplog.clear()

    # Files of other programs, and of earlier versions, do not say.
    save_mask(tmp_path / "m", replace(mask, base_fingerprint=None))
    say_other_base(load_mask(tmp_path / "m", layout_of(other)), other, "m")
    assert not caplog.records
