"""delta.safetensors holds what a task changed, exactly, and applying or reverting it gives back the very bits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from piece_ds.checkpoint.delta_file import load_previous, save_delta
from piece_ds.deltas.patch import require_free
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.zero.weights import read_selected


class Mixed(nn.Module):
    """Parameters of three dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.full = nn.Linear(5, 7)
        self.brain = nn.Linear(7, 3, dtype=torch.bfloat16)
        self.half = nn.Linear(3, 2, dtype=torch.float16)


INDEX = {"full.weight": [0, 3, 34], "brain.bias": [1], "brain.weight": [2, 20], "half.weight": [0, 1, 2, 3, 4, 5]}


@pytest.fixture
def task(tmp_path: Path) -> tuple[Mixed, dict[str, torch.Tensor], dict[str, torch.Tensor], Path, Mask]:
    """(model after, weights before, weights after, delta file, mask)."""
    model = Mixed()
    mask = Mask(layout_of(model), {n: torch.tensor(i) for n, i in INDEX.items()}, 12, "piece-s", 0.2)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    previous = read_selected(model, mask)
    for name, param in model.named_parameters():
        flat = param.data.view(-1)
        for i in INDEX.get(name, []):
            flat[i] += 0.01 * (i + 1)
    save_delta(tmp_path / "delta.safetensors", model, mask, previous)
    after = {name: param.detach().clone() for name, param in model.named_parameters()}
    return model, before, after, tmp_path / "delta.safetensors", mask


def test_indices_values_and_previous_are_exact(task: tuple) -> None:
    _, before, after, path, _ = task
    tensors = load_file(path)
    assert set(tensors) == {f"{name}.{part}" for name in INDEX for part in ("indices", "values", "previous")}
    for name, positions in INDEX.items():
        assert tensors[f"{name}.indices"].dtype == torch.int32
        assert tensors[f"{name}.indices"].tolist() == positions
        for part, weights in (("previous", before), ("values", after)):
            stored = tensors[f"{name}.{part}"]
            assert stored.dtype == weights[name].dtype
            assert torch.equal(stored, weights[name].view(-1)[positions])


def test_reverting_and_applying_are_bit_exact(task: tuple) -> None:
    """By hand from the file, as another program would."""
    model, before, after, path, _ = task
    tensors = load_file(path)
    for part, want in (("previous", before), ("values", after)):
        for name, param in model.named_parameters():
            if name in INDEX:
                param.data.view(-1)[tensors[f"{name}.indices"].long()] = tensors[f"{name}.{part}"]
            assert torch.equal(param.detach(), want[name])


def test_metadata_name_the_format_and_shapes(task: tuple) -> None:
    with safe_open(task[3], framework="np") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["selected"]) == ("piece-delta", "1", "12")
    assert json.loads(metadata["shapes"]) == {
        "full.weight": [7, 5],
        "brain.weight": [3, 7],
        "brain.bias": [3],
        "half.weight": [2, 3],
    }


def test_what_was_read_before_a_task_is_a_copy() -> None:
    model = nn.Linear(3, 1)
    mask = Mask(layout_of(model), {"weight": torch.tensor([0, 1, 2])}, 3)
    previous = read_selected(model, mask)
    kept = previous["weight"].clone()
    model.weight.data.add_(1.0)
    assert torch.equal(previous["weight"], kept)


def test_no_temporary_file_is_left(task: tuple) -> None:
    assert list(task[3].parent.iterdir()) == [task[3]]


def test_previous_values_come_back_for_a_resumed_task(task: tuple) -> None:
    _, before, _, path, mask = task
    for name, values in load_previous(path, mask).items():
        assert torch.equal(values, before[name].view(-1)[INDEX[name]])


def test_previous_values_of_another_mask_are_refused(task: tuple) -> None:
    model, _, _, path, mask = task
    other = Mask(mask.layout, {**mask.index, "full.weight": torch.tensor([0, 4, 34])}, 12)
    with pytest.raises(UserError, match="does not belong to this task's mask"):
        load_previous(path, other)
    with pytest.raises(UserError, match="is missing"):
        load_previous(path.with_name("gone"), mask)
    assert np.isfinite(sum(p.float().sum().item() for p in model.parameters()))


def test_a_delta_may_go_where_no_folder_is_yet_and_nowhere_that_is_taken(tmp_path: Path) -> None:
    for _ in range(2):  # the second time the folders are there
        require_free(tmp_path / "a" / "b" / "new")
    (tmp_path / "a" / "file").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "nowhere")
    for taken in ("b", "file", "link"):
        with pytest.raises(UserError, match="exists already"):
            require_free(tmp_path / "a" / taken)
    with pytest.raises(UserError, match="cannot be written"):
        require_free(tmp_path / "a" / "file" / "below" / "new")
