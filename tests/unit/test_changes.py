"""How many selected values changed: counted by kind, said in one line, with a rate if they are few."""

import json
import logging
from dataclasses import replace
from math import isnan
from pathlib import Path

import pytest
import torch
from support.models import make_model

from piece_ds.checkpoint.delta_file import save_delta
from piece_ds.deltas.delta import Change
from piece_ds.deltas.value_changes import ChangeSize, change_sizes
from piece_ds.evaluation.matrix import ResultMatrix
from piece_ds.models.layout import layout_of
from piece_ds.report.grids import changes_grid
from piece_ds.report.results import RunResults
from piece_ds.state.mask import Mask
from piece_ds.training.changes import with_changes
from piece_ds.zero.weights import read_selected


def delta_of(folder: Path, dtype: torch.dtype, move: float) -> Path:
    """A delta of a model whose every fifth weight has been moved by `move` in fp32 and rounded to dtype."""
    model = make_model("llama").to(dtype)
    layout = layout_of(model)
    index = {info.name: torch.arange(0, info.numel, 5) for info in layout.eligible()}
    mask = Mask(layout, index, sum(map(len, index.values())), "random", 0.2)
    previous = read_selected(model, mask)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name in index:
                flat = param.view(-1)
                flat[index[name]] = (flat[index[name]].float() + move).to(dtype)
    save_delta(folder / "delta.safetensors", model, mask, previous)
    return folder / "delta.safetensors"


def run_of(rate: float = 1e-5) -> RunResults:
    return RunResults("x", "piece-s", 0.2, ResultMatrix(("a",), ("loss",)), settings={"learning_rate": rate})


def test_changed_values_are_counted_by_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A move of 1e-3 is below half of the last place of 1.0 in bf16 (2^-9) and above that of most small weights."""
    caplog.set_level(logging.WARNING)
    results = with_changes(run_of(), "a", delta_of(tmp_path, torch.bfloat16, 1e-3))
    counts = results.changes["a"]
    assert counts["input_layernorm"]["changed"] == 0
    assert counts["mlp.up_proj"]["changed"] > 0.8 * counts["mlp.up_proj"]["values"]
    stored = json.loads(json.dumps(results.to_json()))
    assert RunResults.from_json(stored).changes == results.changes
    assert "least: input_layernorm 0.0%" in caplog.text or "layernorm 0.0%" in caplog.text
    grid = changes_grid("x", results)
    assert ("input_layernorm", "0.0 %") in grid.rows


def test_a_rate_is_proposed_where_few_change_and_would_change_as_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Moves grow with the rate: moved by what is proposed, about four fifths of the values change."""
    caplog.set_level(logging.WARNING)
    move = 1e-4
    with_changes(run_of(1e-5), "a", delta_of(tmp_path, torch.bfloat16, move))
    (line,) = [record.getMessage() for record in caplog.records if "task a" in record.getMessage()]
    proposed = float(line.partition("--learning_rate ")[2].split()[0])
    assert proposed > 1e-5
    again = with_changes(run_of(proposed), "a", delta_of(tmp_path, torch.bfloat16, move * proposed / 1e-5))
    counts = again.changes["a"].values()
    share = sum(cell["changed"] for cell in counts) / sum(cell["values"] for cell in counts)
    assert 0.7 < share < 0.95


def test_nothing_is_proposed_in_fp32_or_without_a_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with_changes(run_of(), "a", delta_of(tmp_path, torch.float32, 1e-4))
    with_changes(replace(run_of(), settings={}), "a", delta_of(tmp_path, torch.bfloat16, 1e-4))
    assert with_changes(run_of(), "a", tmp_path / "none") == run_of()
    assert "--learning_rate" not in caplog.text
    assert "100.0% of the selected values changed" in caplog.text


def test_sizes_of_changes_are_sums_over_all_parameters_of_a_label() -> None:
    """By hand: moves of 1, 0, 3 and then 2 from values of 1, -4, 2 and then -1; a label of zeros has no ratio."""
    first = Change(torch.arange(3), torch.tensor([2.0, -4.0, 5.0]), torch.tensor([1.0, -4.0, 2.0]))
    second = Change(torch.arange(1), torch.tensor([1.0]), torch.tensor([-1.0]))
    zeros = Change(torch.arange(2), torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.0]))
    found = change_sizes([("q", first), ("k", zeros), ("q", second)])
    assert list(found) == ["q", "k"]
    assert found["q"] == ChangeSize(4, 3, sum_distance=6.0, max_distance=3.0, sum_previous=8.0)
    assert (found["q"].mean_distance, found["q"].relative) == (1.5, 0.75)
    assert found["k"] == ChangeSize(2, 1, sum_distance=0.5, max_distance=0.5, sum_previous=0.0)
    assert isnan(found["k"].relative)
