"""Over a thousand files with sound structure and impossible content: each is read or refused in one line, and soon."""

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.hostile import mutated_tensors, mutated_tree, text_of
from support.readers import packed_delta
from torch import nn

from piece_ds.__main__ import main
from piece_ds.checkpoint.delta_file import load_previous, save_delta
from piece_ds.checkpoint.mask_file import load_mask, save_mask
from piece_ds.checkpoint.mask_statistics import read_index
from piece_ds.checkpoint.selected_file import load_selected_state, save_selected_state
from piece_ds.checkpoint.statistics_file import load_statistics, save_statistics
from piece_ds.cli.report import _settings
from piece_ds.deltas.compose import compose
from piece_ds.deltas.delta import open_delta
from piece_ds.deltas.folder import open_folder
from piece_ds.deltas.record import Entry, Record, Unfinished, read_record, write_record
from piece_ds.deltas.value_changes import change_sizes
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.models.layout import layout_of
from piece_ds.models.stored_names import stored_names
from piece_ds.report.results import RunResults, read_results
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.process import exit_code
from piece_ds.state.mask import Mask
from piece_ds.state.statistics import GradientStats
from piece_ds.training.claim import Claim
from piece_ds.training.run_folder import RunFolder
from piece_ds.zero.selected_state import SelectedState
from piece_ds.zero.weights import read_selected

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
LAYOUT = layout_of(MODEL)
MASK = Mask(LAYOUT, {"0.weight": torch.tensor([0, 7, 34]), "1.bias": torch.tensor([2])}, 4, "piece-s", 0.1)
NAMES = stored_names(MODEL)
NUM_MUTATIONS = int(os.environ.get("PIECE_DS_MUTATIONS", "100"))  # of each kind
SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class Kind:
    """How a good file is made in a folder, and everything that reads it."""

    file: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]


def make_statistics(folder: Path) -> None:
    sums = torch.arange(LAYOUT.num_owned, dtype=torch.float32)
    save_statistics(folder, GradientStats(LAYOUT, sums.square(), sums, 9, 2), {"rows": 3, "file": "a.json"})


def make_selected(folder: Path) -> None:
    parts = {name: torch.rand(4) for name in ("values", "exp_avg", "exp_avg_sq")}
    save_selected_state(folder / "s", MASK, SelectedState(parts, 3, {"global_steps": 3.0, "cur_scale": 65536.0}))


def make_model(folder: Path) -> None:
    tensors = {name: param.detach().clone() for name, param in MODEL.named_parameters()}
    save_file(tensors, folder / "part.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 400}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_record(folder: Path) -> None:
    entry = Entry("00-a/delta.safetensors", "c" * 64, "piece-s", 4, "0" * 16, "1" * 16)
    write_record(folder, Record((entry,), Unfinished((("apply", "d" * 64),), (entry, entry), {"f": ("0", "1")})))


def make_results(folder: Path) -> None:
    matrix = ResultMatrix(("a", "b"), ("accuracy", "loss")).with_before({"a": 0.1}, {"a": 2.0, "b": float("inf")}, 3.0)
    results = RunResults(
        name="r",
        method="piece-s",
        ratio=0.1,
        matrix=matrix.with_row({"a": 0.5}, {"a": 1.0, "b": float("nan")}, 3.1),
        masks={"a": {"0": {"q": {"selected": 3, "total": 9}}}},
        overlaps=[[1.0]],
        measures={"before": {"a": {"F1": 0.3}}},
        ability={"before": {"pass@1": 0.1}},
        logs={"a": [{"step": 1, "loss": 2.0, "epoch": 0.1}, {"train_runtime": 3.0}]},
        cost={"a": {"train_seconds": 1.5, "num_steps": 10, "peak_bytes": None}},
        settings={"seed": 1, "deepspeed": "ds.json"},
        notes=["a was judged on rows it trained on."],
    )
    (folder / "results.json").write_text(json.dumps(results.to_json()))


def read_all_results(folder: Path) -> None:
    results = read_results(folder / "results.json")
    assert len(results.training_losses) == len(results.logs)
    assert len(results.selected_counts) == len(results.masks)
    RunResults.from_json(results.to_json())


def read_delta(folder: Path) -> None:
    delta = open_delta(folder / "d")
    change_sizes((name, delta.change(name)) for name in delta.shapes if delta.reversible)


def make_delta_of_gaps(folder: Path) -> None:
    """A delta of version 2: gaps, and a parameter whose values are left out."""
    index = {"0.weight": torch.arange(0, 35, 2), "1.bias": torch.tensor([2])}
    model, mask = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), Mask(LAYOUT, index, 19, "piece-s", 0.1)
    previous = read_selected(model, mask)
    with torch.no_grad():
        model[1].bias[2] = 0
    save_delta(folder / "plain", model, mask, previous)
    compose([open_delta(folder / "plain")], folder / "d", coding="gaps")


def make_run(folder: Path) -> None:
    configuration = {"ModelArguments": {"dtype": "auto", "eligible": None}, "seed": 3, "learning_rate": 1e-3}
    (folder / "run.json").write_text(json.dumps(configuration))


def read_run(folder: Path) -> None:
    _settings(folder, {})
    Claim(RunFolder(folder), {"ModelArguments": {"dtype": "auto", "eligible": None}, "seed": 3}, resume=True).make()


KINDS = {
    "mask": Kind("m", lambda f: save_mask(f / "m", MASK), lambda f: (read_index(f / "m"), load_mask(f / "m", LAYOUT))),
    "mask-2": Kind(
        "m", lambda f: save_mask(f / "m", MASK, "2"), lambda f: (read_index(f / "m"), load_mask(f / "m", LAYOUT))
    ),
    "delta": Kind("d", lambda f: save_delta(f / "d", MODEL, MASK, read_selected(MODEL, MASK)), read_delta),
    "delta-2": Kind("d", make_delta_of_gaps, read_delta),
    "delta-3": Kind("d", lambda f: packed_delta(f / "d"), read_delta),
    "previous": Kind(
        "d",
        lambda f: save_delta(f / "d", MODEL, MASK, read_selected(MODEL, MASK)),
        lambda f: load_previous(f / "d", MASK),
    ),
    "selected": Kind("s", make_selected, lambda f: load_selected_state(f / "s", MASK)),
    "statistics": Kind(
        "statistics-00000-of-00001.safetensors",
        make_statistics,
        lambda f: load_statistics(f, LAYOUT, needs_sum=True),
    ),
    "statistics-index": Kind("statistics.json", make_statistics, lambda f: load_statistics(f, LAYOUT, needs_sum=True)),
    "model": Kind("part.safetensors", make_model, lambda f: open_folder(f, LAYOUT, NAMES)),
    "model-index": Kind("model.safetensors.index.json", make_model, lambda f: open_folder(f, LAYOUT, NAMES)),
    "record": Kind("piece_ds.json", make_record, read_record),
    "results": Kind("results.json", make_results, read_all_results),
    "run": Kind("run.json", make_run, read_run),
}


def test_over_a_thousand_mutations_are_read_or_refused() -> None:
    assert 100 * len(KINDS) >= 1000


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_impossible_content_is_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    kind, rng = KINDS[name], random.Random(name)
    kind.make(tmp_path)
    kind.read(tmp_path)  # the good one
    path = tmp_path / kind.file
    content, num_refused = path.read_bytes(), 0
    for number in range(NUM_MUTATIONS):
        path.write_bytes(_mutation(content, kind.file, rng))
        begin = time.monotonic()
        message = _refusal(kind, tmp_path)
        num_refused += message is not None
        assert "\n" not in (message or ""), number
        assert len(message or "") < 1200, number
        assert time.monotonic() - begin < SLOW_SECONDS, number
    assert num_refused >= NUM_MUTATIONS // 5  # they do reach the checks


def _refusal(kind: Kind, folder: Path) -> str | None:
    """What the reader refuses the file with, or None; any other exception is a defect."""
    try:
        kind.read(folder)
    except UserError as error:
        return str(error)
    return None


def _mutation(content: bytes, file: str, rng: random.Random) -> Any:
    if file.endswith(".json"):
        return text_of(mutated_tree(json.loads(content), rng))
    return mutated_tensors(content, rng)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    """A folder, a pipe that nobody writes to, links to nothing and to themselves, and what may not be read."""
    kind = KINDS[name]
    kind.make(tmp_path)
    path = tmp_path / kind.file
    path.unlink()
    for make in (
        lambda: path.mkdir(),
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(tmp_path / "nothing"),
        lambda: path.symlink_to(path),
    ):
        make()
        with pytest.raises(UserError) as error:
            kind.read(tmp_path)
        assert "\n" not in str(error.value)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize(
    "command", [["delta", "list"], ["delta", "inspect"], ["delta", "apply", "m"], ["report"], ["masks"]], ids=" ".join
)
def test_a_name_too_long_or_a_link_to_itself_is_one_line_in_every_command(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in (tmp_path / ("x" * 300), tmp_path / "loop"):
        with pytest.raises(SystemExit) as ended:
            main([*command, str(name)])
        said = capsys.readouterr().err
        assert ended.value.code == 2, said
        assert said.startswith("error: ")
        assert said.count("\n") == 1


def test_a_training_file_with_a_name_too_long_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")

    def program(argv: list[str]) -> None:
        Path(argv[0]).stat()

    assert exit_code(program, ["x" * 300]) == 2
    assert "longer than a file's name can be" in capsys.readouterr().err


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        for read in (load_mask, lambda path, _: open_delta(path), lambda path, _: read_results(path)):
            with pytest.raises(UserError, match="no such file"):
                read(tmp_path / name, LAYOUT)
