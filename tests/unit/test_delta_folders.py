"""Model folders as others hand them over: what two programs would read differently, what leads outside, whose files."""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.deltas import Run, make_run, sha256_of

from piece_ds.__main__ import main
from piece_ds.deltas import guarded, patch
from piece_ds.deltas.delta import open_delta
from piece_ds.deltas.export import require_stored_names
from piece_ds.deltas.guarded import locked
from piece_ds.runtime.errors import UserError

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), sharded=True)


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    root = tmp_path / "own"
    shutil.copytree(made.base.parent, root)
    return Run(
        root / "base", root / "final", root / "run", [root / path.relative_to(made.base.parent) for path in made.deltas]
    )


def refused(capsys: Capture, root: Path, *arguments: object) -> str:
    """The one line that a command is refused with; nothing below root has changed."""
    before, links = sha256_of(root), sorted(map(str, root.rglob("*")))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["delta", *map(str, arguments)])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert (sha256_of(root), sorted(map(str, root.rglob("*")))) == (before, links)
    return lines[0]


def as_one_file(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_two_sources_of_weights_are_refused(run: Run, capsys: Capture, tmp_path: Path) -> None:
    """One file and an index; a tensor in two files; an index that names another file than holds the tensor."""
    everything = as_one_file(run.base)
    single = run.base / "model.safetensors"
    save_file(everything, single, {"format": "pt"})
    for verb, *target in (("apply", "--in_place"), ("merge", "--output", tmp_path / "o")):
        assert "transformers loads the first" in refused(capsys, tmp_path, verb, run.base, run.folder, *target)
    single.unlink()

    path = run.base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    moved = next(name for name, file in index["weight_map"].items() if file == files[0])
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], moved: files[1]}}))
    assert "in another file" in refused(capsys, tmp_path, "apply", run.base, run.folder, "--in_place")
    path.write_text(json.dumps(index))
    doubled = load_file(run.base / files[1]) | {moved: everything[moved]}
    save_file(doubled, run.base / files[1], {"format": "pt"})
    assert "in another file" in refused(capsys, tmp_path, "apply", run.base, run.folder, "--in_place")


def test_links_that_lead_outside_are_refused(run: Run, capsys: Capture, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("do not copy")
    weights = next(run.base.glob("*.safetensors"))
    kept = tmp_path / "kept.safetensors"
    link = run.base / "notes.txt"

    def weights_outside() -> None:
        shutil.move(weights, kept)
        weights.symlink_to(kept)

    for make in (
        lambda: link.symlink_to(secret),
        lambda: link.symlink_to("../../secret.txt"),
        lambda: link.symlink_to(tmp_path / "nothing"),
        lambda: link.symlink_to("notes.txt"),
        lambda: link.symlink_to(tmp_path),
        weights_outside,
    ):
        make()
        for arguments in (["apply", "--in_place"], ["merge", "--output", tmp_path / "out"]):
            message = refused(capsys, tmp_path, arguments[0], run.base, run.folder, *arguments[1:])
            assert "is a link to" in message, message
        link.unlink(missing_ok=True)
    assert not (tmp_path / "out").exists()


def test_what_is_no_file_is_refused(run: Run, capsys: Capture, tmp_path: Path) -> None:
    other = run.base / "other"
    sockets = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    for make in (lambda: os.mkfifo(other), lambda: sockets.bind("other")):
        os.chdir(run.base)  # the name of a socket is short
        make()
        os.chdir(here)
        assert "neither a file nor a folder" in refused_pipe(capsys, "merge", run.base, run.folder, "--output", "x")
        other.unlink()
    sockets.close()


def refused_pipe(capsys: Capture, *arguments: object) -> str:
    """As refused(), without reading every file."""
    with pytest.raises(SystemExit) as stopped:
        main(["delta", *map(str, arguments)])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_links_inside_and_the_hubs_cache_are_taken(run: Run, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(run.base.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    main(["delta", "merge", str(snapshot), str(run.folder), "--output", str(tmp_path / "merged")])
    assert sha256_of(tmp_path / "merged") == sha256_of(run.final)
    assert not any(path.is_symlink() for path in (tmp_path / "merged").iterdir())


def interrupted(run: Run, monkeypatch: pytest.MonkeyPatch, after: int = 1) -> dict:
    """The record of a change in place that was cut off after some files."""
    calls, real = [], patch.replace_file

    def stop(path: Path, change: Callable) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(path)
        real(path, change)

    monkeypatch.setattr(patch, "replace_file", stop)
    with pytest.raises(KeyboardInterrupt):
        main(["delta", "apply", str(run.base), str(run.folder), "--in_place"])
    monkeypatch.undo()
    return json.loads((run.base / "piece_ds.json").read_text())


def test_a_forged_note_of_unfinished_work_is_refused(
    run: Run, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * 1000)
    outside.chmod(0o600)
    record = interrupted(run, monkeypatch, after=0)
    files, path = record["unfinished"]["files"], run.base / "piece_ds.json"
    same = {file: [pair[0], pair[0]] for file, pair in files.items()}
    other = {file: [pair[1], pair[1]] for file, pair in files.items()}
    for forged, message in (
        ({str(outside): ["0" * 16, "1" * 16]}, "no file of this model"),
        ({"../../outside": ["0" * 16, "1" * 16]}, "no file of this model"),
        ({"config.json": ["0" * 16, "1" * 16]}, "no file of this model"),
        ({}, "are not those after the change"),
        (same, "are not those after the change"),
        (other, "neither as before nor as after"),
        ({file: ["0", "1", "2"] for file in files}, "piece_ds.json"),
        ({file: [0, 1] for file in files}, "piece_ds.json"),
    ):
        path.write_text(json.dumps({**record, "unfinished": {**record["unfinished"], "files": forged}}))
        error = refused(capsys, tmp_path, "apply", run.base, run.folder, "--in_place")
        assert message in error, (forged, error)
    assert oct(outside.stat().st_mode)[-3:] == "600"
    path.write_text(json.dumps(record))
    main(["delta", "apply", str(run.base), str(run.folder), "--in_place"])
    assert {n: s for n, s in sha256_of(run.base).items() if n != "piece_ds.json"} == sha256_of(run.final)


def test_modes_and_owners_stay(run: Run) -> None:
    path = sorted(run.base.glob("*.safetensors"))[0]
    path.chmod(0o640)
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(path, 4321, 8765)
    before = path.stat()
    main(["delta", "apply", str(run.base), str(run.folder), "--in_place"])
    after = path.stat()
    assert before.st_ino != after.st_ino  # it was replaced
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_uid == 4321 or not is_root


def test_a_file_of_another_user_is_refused(
    run: Run, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 7_654_321)
    assert "belongs to user" in refused(capsys, tmp_path, "apply", run.base, run.folder, "--in_place")


def test_while_it_is_written_nobody_else_may_read_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, real = [], patch._patch_file

    def look(folder: object, steps: object, file: str, path: Path) -> None:
        modes.append(path.stat().st_mode & 0o777)
        real(folder, steps, file, path)

    monkeypatch.setattr(patch, "_patch_file", look)
    main(["delta", "apply", str(run.base), str(run.folder), "--in_place"])
    assert set(modes) == {0o600}


def test_one_command_at_a_time(run: Run, capsys: Capture, tmp_path: Path) -> None:
    with locked(run.base):
        error = refused(capsys, tmp_path, "apply", run.base, run.folder, "--in_place")
    assert "another command is changing" in error
    main(["delta", "apply", str(run.base), str(run.folder), "--in_place"])
    assert not (run.base / ".piece_ds.lock").exists()


def test_two_processes_are_never_inside_at_once(tmp_path: Path) -> None:
    """Both win twenty times; mkdir raises when two are inside."""
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            os._exit(_win_twenty_times(tmp_path))
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert os.listdir(tmp_path) == []


def _win_twenty_times(root: Path) -> int:
    won, end = 0, time.monotonic() + 30
    while won < 20 and time.monotonic() < end:
        try:
            with locked(root):
                try:
                    (root / "inside").mkdir()
                except OSError:
                    return 1
                time.sleep(0.001)
                (root / "inside").rmdir()
                won += 1
        except UserError:
            pass
        time.sleep(0.001)
    return 0 if won == 20 else 2


def test_an_output_that_appears_meanwhile_is_left_alone(
    run: Run, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = patch._patch_file

    def slow(*arguments: object) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "theirs").write_text("theirs")
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(patch, "_patch_file", slow)
    with pytest.raises(SystemExit):
        main(["delta", "apply", str(run.base), str(run.folder), "--output", str(tmp_path / "out")])
    assert "appeared while this command ran" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert not list(tmp_path.glob(".*.tmp"))


def test_outputs_that_cannot_be_written(run: Run, capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    for output, message in (
        (tmp_path / "dangling", "exists already"),
        (tmp_path / ("x" * 300), "cannot be written"),
        (tmp_path / "file" / "below", "cannot be written"),
    ):
        assert message in refused(capsys, tmp_path, "merge", run.base, run.folder, "--output", output)


def test_names_that_only_a_model_knows_are_not_exported(run: Run) -> None:
    delta = open_delta(run.deltas[0])
    require_stored_names(delta)
    for name, shape in (
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 8)),
        ("model.layers.0.mlp.experts.down_proj_bias", (4, 8)),
        ("model.layers.0.block_sparse_moe.experts.weight", (4, 8, 8)),
        ("model.language_model.layers.0.mlp.up_proj.weight", (8, 8)),
        ("model.layers.0.mixer.A_log", (8,)),
    ):
        forged = type(delta)(delta.path, delta.metadata, {name: shape}, {name: torch.float32}, True)
        with pytest.raises(UserError, match="add --model"):
            require_stored_names(forged)


def test_locks_of_threads_are_apart(tmp_path: Path) -> None:
    refusals = []

    def other() -> None:
        try:
            with locked(tmp_path):
                pass
        except UserError as error:
            refusals.append(str(error))

    with locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refusals) == 1


def test_a_file_is_changed_in_place_only_if_it_keeps_its_owner_and_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may give a file to anyone; others need to own it and to be in its group."""
    file = SimpleNamespace(stat=lambda: SimpleNamespace(st_uid=7, st_gid=8))
    for user, group, others, may in (
        (7, 8, [], True),
        (7, 9, [10, 8], True),
        (7, 9, [10], False),
        (6, 8, [8], False),
        (0, 0, [], True),
    ):
        monkeypatch.setattr(guarded.os, "geteuid", lambda user=user: user)
        monkeypatch.setattr(guarded.os, "getegid", lambda group=group: group)
        monkeypatch.setattr(guarded.os, "getgroups", lambda others=others: others)
        refusal = pytest.raises(
            UserError, match=f"belongs to user 7, group 8: .* belong to {user}; run this as its owner"
        )
        with nullcontext() if may else refusal:
            guarded.require_changeable(file)  # type: ignore[arg-type]
