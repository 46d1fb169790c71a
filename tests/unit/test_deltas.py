"""Deltas go on a model folder and off again: the very files, whatever the dtype, the sharding and the tying."""

import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.deltas import Run, make_run, sha256_of
from support.models import make_model
from transformers import AutoModelForCausalLM

from piece_ds.__main__ import main
from piece_ds.deltas import apply_delta_, patch
from piece_ds.deltas.chain_files import chain_folders
from piece_ds.deltas.delta import find_deltas, open_delta
from piece_ds.deltas.folder import ModelFolder, open_folder
from piece_ds.deltas.verify import Step, file_fingerprint, verify
from piece_ds.models.layout import layout_of
from piece_ds.models.stored_names import stored_names
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.files import write_folder
from piece_ds.state.mask import Mask
from piece_ds.state.weights_hash import bits_of, hash_elements, hash_range
from piece_ds.zero.weights import weights_fingerprint

pytestmark = pytest.mark.heavy

KINDS = [
    ("llama", torch.bfloat16, False),
    ("llama", torch.bfloat16, True),
    ("llama", torch.float32, True),
    ("qwen3", torch.bfloat16, False),
    ("qwen3", torch.float32, True),
    ("neox", torch.float16, True),
]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}-{'sharded' if kind[2] else 'single'}")
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    family, dtype, sharded = request.param
    made = make_run(tmp_path, family, dtype, sharded)
    assert (len(list(made.base.glob("*.safetensors"))) > 2) == sharded
    return made


@pytest.fixture
def small(tmp_path: Path) -> Run:
    return make_run(tmp_path, sharded=True)


def model_of(root: Path) -> ModelFolder:
    model = AutoModelForCausalLM.from_pretrained(root, dtype="auto")
    return open_folder(root, layout_of(model), stored_names(model))


def delta(*arguments: object) -> None:
    main(["delta", *map(str, arguments)])


def test_base_and_stack_are_the_final_model_and_back_are_the_same_files(run: Run, tmp_path: Path) -> None:
    delta("apply", run.base, run.folder, "--output", tmp_path / "out")
    weights = {name: sha for name, sha in sha256_of(tmp_path / "out").items() if name != "piece_ds.json"}
    assert weights == sha256_of(run.final)
    assert weights != sha256_of(run.base)
    delta("revert", tmp_path / "out", run.folder, "--output", tmp_path / "back")
    assert sha256_of(tmp_path / "back") == sha256_of(run.base)


def test_in_place_one_delta_at_a_time(run: Run) -> None:
    before, after = sha256_of(run.base), sha256_of(run.final)
    for path in run.deltas:
        delta("apply", run.base, path, "--in_place")
    record = json.loads((run.base / "piece_ds.json").read_text())
    assert [entry["delta"] for entry in record["applied"]] == [f"{i:02d}-task/delta.safetensors" for i in range(3)]
    assert {name: sha for name, sha in sha256_of(run.base).items() if name != "piece_ds.json"} == after
    for path in reversed(run.deltas):
        delta("revert", run.base, path, "--in_place")
    assert sha256_of(run.base) == before


def test_a_trained_model_without_a_record_is_reverted(small: Run, tmp_path: Path) -> None:
    delta("revert", small.final, small.folder, "--output", tmp_path / "back")
    assert sha256_of(tmp_path / "back") == sha256_of(small.base)


def test_merged_folder_is_plain_and_loads_with_the_final_weights(run: Run, tmp_path: Path) -> None:
    delta("merge", run.base, *run.deltas, "--output", tmp_path / "merged")
    assert sha256_of(tmp_path / "merged") == sha256_of(run.final)
    merged, final = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "merged", run.final))
    for (name, one), (_, other) in zip(merged.named_parameters(), final.named_parameters(), strict=True):
        assert torch.equal(bits_of(one.data), bits_of(other.data)), name


def test_composed_delta_equals_the_stack_both_ways(run: Run, tmp_path: Path) -> None:
    delta("compose", run.folder, "--output", tmp_path / "one.safetensors")
    delta("apply", run.base, tmp_path / "one.safetensors", "--output", tmp_path / "out")
    assert all(sha256_of(tmp_path / "out")[name] == sha for name, sha in sha256_of(run.final).items())
    delta("revert", tmp_path / "out", tmp_path / "one.safetensors", "--output", tmp_path / "back")
    assert sha256_of(tmp_path / "back") == sha256_of(run.base)


def test_without_previous_values_a_16_bit_delta_costs_6_bytes_a_value(small: Run, tmp_path: Path) -> None:
    delta("compose", small.deltas[0], "--without_previous", "--output", tmp_path / "short.safetensors")
    short, num_selected = load_file(tmp_path / "short.safetensors"), open_delta(small.deltas[0]).num_selected
    assert sum(tensor.nbytes for tensor in short.values()) == 6 * num_selected
    assert sum(tensor.nbytes for tensor in load_file(small.deltas[0]).values()) == 8 * num_selected
    delta("apply", small.base, tmp_path / "short.safetensors", "--output", tmp_path / "out")
    delta("apply", tmp_path / "out", *small.deltas[1:], "--output", tmp_path / "all")
    assert all(sha256_of(tmp_path / "all")[name] == sha for name, sha in sha256_of(small.final).items())


def test_a_tied_weight_stored_under_both_names_is_changed_under_both(tmp_path: Path) -> None:
    """Some published checkpoints hold a copy of the tied head; a mask file may select embeddings."""
    run = make_run(tmp_path, "qwen3", select=lambda name: True)
    for folder in (run.base, run.final):
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = load_file(run.final / "model.safetensors")
    before = sha256_of(run.base)
    delta("apply", run.base, run.folder, "--in_place")
    found = load_file(run.base / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(bits_of(found[name]), bits_of(expected[name])) for name in expected)
    delta("revert", run.base, run.folder, "--in_place")
    assert sha256_of(run.base) == before


def test_what_a_pass_says_of_each_file_is_what_is_in_it_before_and_after(run: Run) -> None:
    """Also where a tensor is of a dtype that no delta can have: it counts in no fingerprint."""
    base, final = model_of(run.base), model_of(run.final)
    deltas = [open_delta(path) for path in run.deltas]
    untouched = next(name for name in base.stored if base.parameter_of[name] not in deltas[0].shapes)
    for odd in (None, untouched):
        folders = [
            replace(folder, stored={k: replace(v, dtype=None) if k == odd else v for k, v in folder.stored.items()})
            for folder in (base, final)
        ]
        silent = [replace(delta, metadata=without_fingerprints(delta.metadata)) for delta in deltas]
        found = verify(folders[0], [Step(delta) for delta in (silent if odd else deltas)])
        for file in base.files:
            ends = tuple(file_fingerprint(folder, file) for folder in folders)
            assert found.files.get(file, (ends[0], ends[0])) == ends
            assert (file in found.files) == (ends[0] != ends[1])
        assert found.fingerprints[0] != found.fingerprints[-1]


def without_fingerprints(metadata: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if not name.endswith("fingerprint")}


@pytest.mark.parametrize("num_done", [0, 1, 2])
def test_an_interrupted_change_in_place_is_finished_by_the_same_command(
    small: Run, num_done: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def replace_file(path: Path, change: object) -> None:
        if len(calls) == num_done:
            raise KeyboardInterrupt
        calls.append(path)
        original(path, change)

    original = patch.replace_file
    monkeypatch.setattr(patch, "replace_file", replace_file)
    with pytest.raises(KeyboardInterrupt):
        delta("apply", small.base, *small.deltas[:2], "--in_place")
    monkeypatch.undo()
    for other in (
        ["apply", small.base, small.deltas[0], "--in_place"],
        ["merge", small.base, small.deltas[0], "--output", small.base.parent / "m"],
    ):
        with pytest.raises(SystemExit):
            delta(*other)
        assert "interrupted: run the same command again" in capsys.readouterr().err
    delta("apply", small.base, *small.deltas[:2], "--in_place")
    delta("apply", small.base, small.deltas[2], "--in_place")
    assert {k: v for k, v in sha256_of(small.base).items() if k != "piece_ds.json"} == sha256_of(small.final)


def test_a_failing_copy_leaves_nothing(small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(patch, "_patch_file", fail)
    with pytest.raises(OSError, match="no space"):
        delta("apply", small.base, small.folder, "--output", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run", "final"}


def test_fingerprints_chain_through_the_stack(small: Run) -> None:
    deltas = [open_delta(path) for path in small.deltas]
    assert [d.result_fingerprint for d in deltas[:-1]] == [d.base_fingerprint for d in deltas[1:]]
    assert len({d.base_fingerprint for d in deltas} | {deltas[-1].result_fingerprint}) == 4


@pytest.mark.parametrize("numel", [1, 65535, 65536, 65537, 200_003])
def test_hash_of_a_range_is_the_sum_of_its_parts_and_of_its_elements(numel: int) -> None:
    bits = bits_of(torch.randn(numel, generator=torch.Generator().manual_seed(1)).bfloat16())
    cut = numel // 3
    whole = hash_range("a", bits)
    assert (hash_range("a", bits[:cut]) + hash_range("a", bits[cut:], cut)) % 2**64 == whole
    assert hash_elements("a", torch.arange(numel), bits) == whole
    assert hash_range("b", bits) != whole
    if numel > 1:
        assert hash_range("a", bits.flip(0)) != whole


def test_fingerprint_of_unselected_weights_does_not_see_the_selected_ones() -> None:
    model = make_model("llama")
    mask = Mask(layout_of(model), {"lm_head.weight": torch.tensor([0, 5, 3394])}, 3)
    before = weights_fingerprint(model, mask)
    model.lm_head.weight.data.view(-1)[[0, 5, 3394]] += 1
    assert weights_fingerprint(model, mask) == before
    model.lm_head.weight.data.view(-1)[6] += 1
    assert weights_fingerprint(model, mask) != before


def test_the_tasks_of_a_run_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Also past a hundred tasks, where text puts 100 before 99."""
    for name in ("99-b", "100-a", "07-c", "notes"):
        (tmp_path / name / "chain").mkdir(parents=True)
        (tmp_path / name / "delta.safetensors").touch()
    names = ["07-c", "99-b", "100-a"]
    assert [path.parent.name for path in find_deltas([tmp_path])] == names
    assert [path.parent.name for path in chain_folders(tmp_path)] == names


def test_a_folder_with_one_delta_is_opened_as_it(small: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """As the commands take it; what holds several, and a model folder, say so."""
    task = small.deltas[1].parent
    assert open_delta(task).metadata == open_delta(small.deltas[1]).metadata
    live = apply_delta_(AutoModelForCausalLM.from_pretrained(small.base), small.deltas[0].parent, alpha=0.5)
    assert live.held
    with pytest.raises(
        UserError, match=rf"run holds 3 deltas: open one of them, such as .*{small.deltas[0].parent.name}"
    ):
        open_delta(small.folder)
    delta("apply", small.base, small.deltas[0], "--in_place")
    assert capsys.readouterr().out.splitlines()[-1] == f"applied 1 delta: {small.base}"
    with pytest.raises(
        UserError, match=r"found none in it; it is a model folder, whose piece_ds.json names the deltas"
    ):
        open_delta(small.base)


def test_who_may_read_what_is_written_is_what_the_umask_says(small: Run, tmp_path: Path) -> None:
    """safetensors itself lets nobody but the owner: a team could not share its tasks."""
    before = os.umask(0o027)
    try:
        delta("scale", small.deltas[0], "--alpha", 0.5, "--output", tmp_path / "half.safetensors")
        write_folder(tmp_path / "folder", AutoModelForCausalLM.from_pretrained(small.base).save_pretrained)
    finally:
        os.umask(before)
    files = [tmp_path / "half.safetensors", *(tmp_path / "folder").iterdir()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}
