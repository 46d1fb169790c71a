"""What cannot be right is refused: exit code 2, one line that says what to do, and not a byte written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.deltas import Run, make_run, sha256_of

from piece_ds.__main__ import main


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), sharded=True)


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy that a test may break."""
    shutil.copytree(made.base.parent, tmp_path / "own")
    root = tmp_path / "own"
    return Run(
        root / "base", root / "final", root / "run", [root / path.relative_to(made.base.parent) for path in made.deltas]
    )


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Path:
    """Change a delta file's tensors and metadata, without its checksum."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    del metadata["checksum"]
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def forget_fingerprints(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    for key in ("base_fingerprint", "result_fingerprint"):
        metadata.pop(key)


def forget_previous(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    for name in [name for name in tensors if name.endswith(".previous")]:
        del tensors[name]


def forget_both(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    forget_previous(tensors, metadata)
    forget_fingerprints(tensors, metadata)


def unsort(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["lm_head.weight.indices"] = tensors["lm_head.weight.indices"].flip(0)


def past_the_end(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["lm_head.weight.indices"][-1] = 97 * 35


def shorten(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    tensors["lm_head.weight.values"] = tensors["lm_head.weight.values"][1:].clone()


def widen(tensors: dict[str, torch.Tensor], _: dict[str, str]) -> None:
    for part in ("values", "previous"):
        tensors[f"lm_head.weight.{part}"] = tensors[f"lm_head.weight.{part}"].float()


def miscount(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["selected"] = "7"


def be_a_mask(_: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["format"] = "piece-mask"


def move_one(folder: Path, name: str, position: int) -> None:
    """Another weight in the folder, bit 0 of one element flipped."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(-1).view(torch.int16)[position] ^= 1
    save_file(tensors, path, {"format": "pt"})


def unselected(run: Run, name: str) -> int:
    taken = torch.cat([load_file(path)[f"{name}.indices"] for path in run.deltas]).tolist()
    return next(i for i in range(len(taken) + 1) if i not in taken)


def refused(capsys: pytest.CaptureFixture[str], root: Path, message: str, *arguments: object) -> None:
    before = sha256_of(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["delta", *map(str, arguments)])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sha256_of(root) == before


Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("where", ["--in_place", "--output"])
@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([1], "give the base it was trained on and the deltas before it, in task order"),
        ([1, 0], "give the base it was trained on and the deltas before it, in task order"),
        ([0, 2], "give the base it was trained on and the deltas before it, in task order"),
        ([0, 0], "is given twice: leave one out"),
    ],
)
def test_deltas_out_of_order(
    run: Run, capsys: Capture, tmp_path: Path, order: list[int], message: str, where: str
) -> None:
    target = [where] if where == "--in_place" else [where, tmp_path / "out"]
    refused(capsys, tmp_path, message, "apply", run.base, *(run.deltas[i] for i in order), *target)


def test_a_delta_that_is_applied_already(run: Run, capsys: Capture, tmp_path: Path) -> None:
    main(["delta", "apply", str(run.base), str(run.deltas[0]), "--in_place"])
    refused(capsys, tmp_path, "is applied already", "apply", run.base, run.deltas[0], "--in_place")
    (run.base / "piece_ds.json").unlink()
    refused(capsys, tmp_path, "is applied already", "apply", run.base, run.deltas[0], "--in_place")


def test_a_delta_given_twice_is_said_to_be_whatever_the_command(run: Run, capsys: Capture, tmp_path: Path) -> None:
    """Not that the model has it, which it has not; by another path too."""
    first, copied, out = run.deltas[0], tmp_path / "copied.safetensors", tmp_path / "out.safetensors"
    shutil.copyfile(first, copied)
    for again, said in ((first, "is given twice: leave one out"), (copied, f"is given twice (as {first} too)")):
        refused(capsys, tmp_path, said, "compose", first, again, "--output", out)
        refused(capsys, tmp_path, said, "merge", run.base, first, again, "--output", tmp_path / "merged")
    main(["delta", "apply", str(run.base), str(run.folder), "--in_place"])
    last = run.deltas[-1]
    refused(capsys, tmp_path, "is given twice", "revert", run.base, last, last, "--in_place")
    (run.base / "piece_ds.json").unlink()
    refused(capsys, tmp_path, "is given twice", "revert", run.base, last, last, "--in_place")


def test_reverting_another_than_the_last(run: Run, capsys: Capture, tmp_path: Path) -> None:
    main(["delta", "apply", str(run.base), str(run.folder), "--in_place"])
    refused(capsys, tmp_path, "is not the last one applied", "revert", run.base, run.deltas[1], "--in_place")
    (run.base / "piece_ds.json").unlink()
    refused(capsys, tmp_path, "only the last delta of a stack", "revert", run.base, run.deltas[1], "--in_place")
    refused(capsys, tmp_path, "cannot be reverted", "revert", run.base, *run.deltas[:2], "--in_place")


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_one_bit_of_a_selected_weight_differs(run: Run, capsys: Capture, tmp_path: Path, verb: str) -> None:
    folder = run.base if verb == "apply" else run.final
    path = run.deltas[0] if verb == "apply" else run.deltas[2]
    move_one(folder, "lm_head.weight", int(load_file(path)["lm_head.weight.indices"][3]))
    refused(
        capsys,
        tmp_path,
        f"1 of its {open_selected(path)} selected values are not what it expects",
        verb,
        folder,
        path,
        "--in_place",
    )


def open_selected(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["selected"])


@pytest.mark.parametrize("verb", ["apply", "revert"])
def test_one_bit_of_another_weight_differs(run: Run, capsys: Capture, tmp_path: Path, verb: str) -> None:
    folder, path = (run.base, run.deltas[0]) if verb == "apply" else (run.final, run.deltas[2])
    move_one(folder, "lm_head.weight", unselected(run, "lm_head.weight"))
    refused(capsys, tmp_path, "weights outside its selection differ", verb, folder, path, "--in_place")


def test_without_previous_values_the_fingerprint_still_tells_the_base(
    run: Run, capsys: Capture, tmp_path: Path
) -> None:
    path = rewrite(run.deltas[0], forget_previous)
    main(["delta", "apply", str(run.base), str(path), "--output", str(tmp_path / "good")])
    refused(capsys, tmp_path, "cannot be reverted", "revert", tmp_path / "good", path, "--in_place")
    move_one(run.base, "lm_head.weight", int(load_file(path)["lm_head.weight.indices"][3]))
    refused(capsys, tmp_path, "weights outside its selection differ", "apply", run.base, path, "--in_place")


def test_without_fingerprints_previous_values_still_tell_the_base(run: Run, capsys: Capture, tmp_path: Path) -> None:
    path = rewrite(run.deltas[0], forget_fingerprints)
    main(["delta", "apply", str(run.base), str(path), "--output", str(tmp_path / "good")])
    move_one(run.base, "lm_head.weight", int(load_file(path)["lm_head.weight.indices"][3]))
    refused(capsys, tmp_path, "are not what it expects", "apply", run.base, path, "--in_place")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget_both, "neither previous values nor its base's fingerprint"),
        (unsort, "not ascending positions below 3395"),
        (past_the_end, "not ascending positions below 3395"),
        (shorten, "differ in length"),
        (widen, "save the model in the dtype it was trained in"),
        (miscount, "its metadata says 7"),
        (be_a_mask, "expected 'piece-delta'"),
    ],
)
def test_a_delta_that_is_not_what_it_says(
    run: Run, capsys: Capture, tmp_path: Path, change: Callable, message: str
) -> None:
    path = rewrite(run.deltas[0], change)
    refused(capsys, tmp_path, message, "apply", run.base, path, "--in_place")


def test_a_damaged_delta(run: Run, capsys: Capture, tmp_path: Path) -> None:
    content = bytearray(run.deltas[0].read_bytes())
    content[-1] ^= 1
    run.deltas[0].write_bytes(content)
    refused(capsys, tmp_path, "is damaged", "apply", run.base, run.folder, "--in_place")
    run.deltas[0].write_bytes(content[:-5])
    refused(capsys, tmp_path, "cannot be read as a safetensors file", "apply", run.base, run.folder, "--in_place")


def test_another_model(run: Run, capsys: Capture, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", "qwen3")
    refused(capsys, tmp_path, "was made for another model", "apply", other.base, run.deltas[0], "--in_place")


def test_another_dtype(run: Run, capsys: Capture, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", dtype=torch.float32)
    refused(capsys, tmp_path, "save the model in the dtype", "apply", other.base, run.deltas[0], "--in_place")


def test_folders_that_are_none(run: Run, capsys: Capture, tmp_path: Path) -> None:
    refused(capsys, tmp_path, "found nothing there", "apply", tmp_path / "no", run.folder, "--in_place")
    refused(capsys, tmp_path, "found a file", "apply", run.deltas[0], run.folder, "--in_place")
    refused(capsys, tmp_path, "no model can be loaded", "apply", run.folder, run.folder, "--in_place")
    refused(capsys, tmp_path, "found nothing there", "list", tmp_path / "no")
    refused(capsys, tmp_path, "found none in it", "list", run.base)
    (run.base / "model.safetensors.index.json").unlink()
    refused(capsys, tmp_path, "found neither", "apply", run.base, run.folder, "--in_place")


def test_a_truncated_model_file(run: Run, capsys: Capture, tmp_path: Path) -> None:
    path = next(iter(sorted(run.base.glob("*.safetensors"))))
    path.write_bytes(path.read_bytes()[:-2])
    refused(capsys, tmp_path, "is truncated", "apply", run.base, run.folder, "--in_place")


def test_a_model_file_that_is_gone(run: Run, capsys: Capture, tmp_path: Path) -> None:
    next(iter(sorted(run.base.glob("*.safetensors")))).unlink()
    refused(capsys, tmp_path, "no such file", "apply", run.base, run.folder, "--in_place")


@pytest.mark.parametrize("verb", ["apply", "revert", "merge"])
def test_an_output_that_exists(run: Run, capsys: Capture, tmp_path: Path, verb: str) -> None:
    refused(capsys, tmp_path, "exists already", verb, run.base, run.folder, "--output", run.final)


def test_composing_what_is_not_consecutive(run: Run, capsys: Capture, tmp_path: Path) -> None:
    out = ["--output", tmp_path / "one.safetensors"]
    refused(capsys, tmp_path, "does not follow", "compose", run.deltas[0], run.deltas[2], *out)
    rewrite(run.deltas[1], forget_previous)
    refused(capsys, tmp_path, "add --without_previous", "compose", *run.deltas[:2], *out)
    rewrite(run.deltas[2], forget_fingerprints)
    refused(capsys, tmp_path, "has no fingerprints", "compose", *run.deltas[1:], "--without_previous", *out)


@pytest.mark.parametrize(
    "arguments", [[], ["apply"], ["apply", "a", "b"], ["fly"], ["apply", "a", "b", "--in_place", "--output", "c"]]
)
def test_a_wrong_command_line_is_one_line(capsys: Capture, tmp_path: Path, arguments: list[str]) -> None:
    refused(capsys, tmp_path, "--help", *arguments)


def test_a_command_without_the_flag_does_not_name_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Messages of the loader name train's flag for a model."""
    (tmp_path / "model").mkdir()
    with pytest.raises(SystemExit) as left:
        main(["delta", "diff", str(tmp_path / "model"), str(tmp_path / "model"), "--output", str(tmp_path / "d")])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith(f"error: model {tmp_path / 'model'}: no model can be loaded from there")
    assert "--model_name_or_path" not in error
