"""Stacks and chains of deltas that somebody else hands over: long, circular, repeated, or lying about themselves."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.deltas import move_selected, random_mask
from support.models import embedding_name, make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from piece_ds.__main__ import main
from piece_ds.checkpoint import artifact
from piece_ds.checkpoint.delta_file import chain_metadata
from piece_ds.checkpoint.delta_parts import write_parts
from piece_ds.checkpoint.metadata import describe
from piece_ds.deltas import ChainFollower, apply_delta_, open_delta, record
from piece_ds.deltas.chain import open_link
from piece_ds.deltas.chain_files import chain_folders, link_file, link_files
from piece_ds.deltas.compose import compose
from piece_ds.deltas.delta import Delta, find_deltas
from piece_ds.deltas.record import Record
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.training.chain_writer import ChainWriter
from piece_ds.zero.weights import read_selected

Capture = pytest.CaptureFixture[str]


class Chain:
    """Links of a tiny model, whose weights are those of the given states in turn."""

    def __init__(self, root: Path, num_links: int, num_states: int) -> None:
        self.base, self.folder = root / "base", root / "00-task" / "chain"
        self.model = make_model("llama")
        self.model.save_pretrained(self.base)
        self.mask = random_mask(self.model, 0, 0.01, lambda name: name != embedding_name("llama"))
        writer = ChainWriter(self.folder, self.model, self.mask, read_selected(self.model, self.mask))
        states = [clone(self.model)]
        for seed in range(num_states - 1):
            move_selected(self.model, self.mask, seed)
            states.append(clone(self.model))
        for number in range(num_links):
            self.model.load_state_dict(states[(number + 1) % num_states])
            writer.write(number + 1)
        assert len(link_files(self.folder)) == num_links


def clone(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path, 4, 9)


def refused(capsys: Capture, *words: object) -> str:
    with pytest.raises(SystemExit) as error:
        main(["delta", *map(str, words)])
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    return lines[-1]


def rewrite(path: Path, **changes: str | None) -> None:
    """Change the metadata of a file whose checksum is over its tensors alone."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for key, value in changes.items():
        header["__metadata__"].pop(key, None)
        header["__metadata__"] |= {} if value is None else {key: value}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def test_weights_that_come_back_are_followed_and_applied_and_a_repeated_link_is_not(
    tmp_path: Path, capsys: Capture
) -> None:
    """Links 0 and 2 make the same change to the same weights, since link 1 undoes it."""
    chain = Chain(tmp_path, 3, 2)
    first, _, third = map(open_delta, link_files(chain.folder))
    assert first.metadata["checksum"] == third.metadata["checksum"]
    assert (first.base_fingerprint, first.result_fingerprint) == (third.base_fingerprint, third.result_fingerprint)
    main(["delta", "apply", str(chain.base), str(chain.folder), "--output", str(tmp_path / "there")])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "there").state_dict()
    assert all(torch.equal(found[name], wanted) for name, wanted in chain.model.state_dict().items())
    model = AutoModelForCausalLM.from_pretrained(chain.base)
    assert len(ChainFollower(model, chain.folder).apply_new()) == 3
    assert all(torch.equal(model.state_dict()[name], wanted) for name, wanted in chain.model.state_dict().items())
    message = refused(capsys, "apply", chain.base, first.path, first.path, "--output", tmp_path / "twice")
    assert "is given twice: leave one out" in message
    assert "is given twice: leave one out" in refused(
        capsys, "compose", first.path, first.path, "--without_previous", "--output", tmp_path / "c"
    )
    assert not (tmp_path / "twice").exists()
    assert not (tmp_path / "c").exists()


def test_a_thousand_links_are_applied_and_composed_without_a_look_for_each_pair(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: files are opened once, whatever the number of parameters, and entries are made once."""
    chain, opened = Chain(tmp_path, 40, 2), [0]
    real = artifact.safe_open

    def counted(path: Path, **options: Any) -> Any:
        opened[0] += Path(path).parent == chain.folder
        return real(path, **options)

    monkeypatch.setattr(artifact, "safe_open", counted)
    main(["delta", "apply", str(chain.base), str(chain.folder), "--output", str(tmp_path / "there")])
    assert opened[0] == 40
    main(["delta", "compose", str(chain.folder), "--without_previous", "--output", str(tmp_path / "one")])
    assert opened[0] == 80

    # Entries of the record: one a delta.
    made = [0]
    real_entry = record.entry_of

    def entry(delta: Delta) -> record.Entry:
        made[0] += 1
        return real_entry(delta)

    monkeypatch.setattr(record, "entry_of", entry)
    delta = open_delta(link_file(chain.folder, 0))
    many = [
        Delta(delta.path, delta.metadata | {"checksum": f"{number}"}, delta.shapes, delta.dtypes, False)
        for number in range(1000)
    ]
    assert len(Record().after(many, [], tmp_path).applied) == made[0] == 1000


BAD_METADATA = [
    ("base_fingerprint", "zz"),
    ("base_fingerprint", "f" * 5000),
    ("result_fingerprint", "0x1\n\x1b[31m"),
    ("result_fingerprint", ""),
    ("result_fingerprint", "A" * 16),
    ("link", "1.0"),
    ("link", "+1"),
    ("link", "1_0"),
    ("link", "\u0661"),
    ("step", "20.0"),
    ("step", " 20"),
    ("selected", "{}.0"),
    ("total", "0"),
    ("total", "5.0"),
    ("total", "7"),
    ("ratio", "0"),
    ("ratio", "-1"),
    ("ratio", "1.5"),
    ("ratio", "inf"),
]


def test_metadata_that_cannot_be_are_refused_by_every_reader(chain: Chain, tmp_path: Path, capsys: Capture) -> None:
    path = link_file(chain.folder, 1)
    content, num_selected = path.read_bytes(), open_delta(path).num_selected
    for key, value in BAD_METADATA:
        path.write_bytes(content)
        rewrite(path, **{key: value.format(num_selected)})
        message = refused(capsys, "compose", chain.folder, "--without_previous", "--output", tmp_path / "o")
        assert key in message
        assert str(path) in message
        with pytest.raises(UserError, match=key):
            open_link(path)
        with pytest.raises(UserError, match=key):
            apply_delta_(chain.model, path)
    assert not (tmp_path / "o").exists()


def test_parents_in_a_circle_and_links_that_are_no_files_end_in_one_line_or_in_the_right_weights(
    chain: Chain, tmp_path: Path, capsys: Capture
) -> None:
    paths = link_files(chain.folder)
    checksums = [str(open_delta(path).metadata["checksum"]) for path in paths]
    attacks: dict[str, tuple[Callable[[Path], object], bool]] = {
        "circle": (lambda folder: rewrite(link_file(folder, 0), parent=checksums[3]), True),
        "own parent": (lambda folder: rewrite(link_file(folder, 1), parent=checksums[1]), False),
        "no parent": (lambda folder: rewrite(link_file(folder, 1), parent=""), False),
        "pipe": (lambda folder: exchange(link_file(folder, 1), os.mkfifo), False),
        "folder": (lambda folder: exchange(link_file(folder, 1), Path.mkdir), False),
        "itself": (lambda folder: exchange(link_file(folder, 1), lambda path: path.symlink_to(path.name)), False),
        "nothing": (lambda folder: link_file(folder, 2).unlink(), False),
    }
    for what, (attack, is_right) in attacks.items():
        folder = tmp_path / what / "chain"
        shutil.copytree(chain.folder, folder)
        attack(folder)
        model = AutoModelForCausalLM.from_pretrained(chain.base)
        if is_right:
            assert len(ChainFollower(model, folder).apply_new()) == 4, what
            continue
        with pytest.raises(UserError) as error:
            ChainFollower(model, folder).apply_new()
        assert "\n" not in str(error.value), what


def exchange(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def test_a_stack_whose_deltas_disagree_over_a_parameter_is_refused_also_if_they_are_no_neighbours(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    mask = Mask(random_mask(model, 0, 1.0, lambda name: True).layout, {}, 4, "piece-s", 0.5)

    def write(number: int, name: str, shape: list[int], dtype: torch.dtype) -> Delta:
        values = torch.ones(2, dtype=dtype)
        parts = {name: {"indices": torch.tensor([0, 1]), "values": values, "previous": values - 1}}
        metadata = describe(mask, [name]) | chain_metadata("", 1, number) | {"selected": "2"}
        metadata |= {"shapes": json.dumps({name: shape})}
        metadata |= {"base_fingerprint": f"{number:016x}", "result_fingerprint": f"{number + 1:016x}"}
        write_parts(tmp_path / str(number), parts, {name: 6}, metadata)
        return open_delta(tmp_path / str(number))

    between = write(1, "1.weight", [2, 2], torch.float32)
    first = write(0, "0.weight", [2, 3], torch.float32)
    for last, message in (
        (write(2, "0.weight", [2, 3], torch.bfloat16), "different dtypes: '0.weight'"),
        (write(2, "0.weight", [6], torch.float32), "different models: '0.weight'"),
    ):
        with pytest.raises(UserError, match=message):
            compose([first, between, last], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_folders_of_tasks_have_numbers_that_python_reads(chain: Chain, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("10-b", "9-a", "\u00b2-c", "x-d"):
        shutil.copytree(chain.folder, run / name / "chain")
        shutil.copy(link_file(chain.folder, 0), run / name / "delta.safetensors")
    assert [path.parent.name for path in find_deltas([run])] == ["9-a", "10-b"]
    assert [path.parent.name for path in chain_folders(run)] == ["9-a", "10-b"]
