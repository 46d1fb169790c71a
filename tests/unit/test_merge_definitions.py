"""TIES and a linear merge give what mergekit's own functions gave on the same numbers.

Expected values are those of mergekit 0.1.5 in fp64: sparsify.magnitude, get_mask(method="sum") and the normalized sum
of generalized_task_arithmetic. No two changes of a task have one size, since mergekit breaks ties at random. It trims
tensor by tensor and piece_ds over the whole model, which is the same for one tensor; where changes cancel exactly,
mergekit takes the positive ones and piece_ds, as the paper, nothing. Its DARE matches norms instead of dividing by
the density; piece_ds divides, as arXiv 2311.03099 does: test_delta_algebra.py.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from piece_ds.checkpoint.delta_file import save_delta
from piece_ds.deltas import Merge, merge_deltas, open_delta
from piece_ds.deltas.depth import depth_factors
from piece_ds.models.layout import layout_of
from piece_ds.runtime.errors import UserError
from piece_ds.state.mask import Mask
from piece_ds.zero.weights import read_selected

BASE = [0.5, -0.25, 1.0, 0.0, -1.5, 0.125, 2.0, -0.75, 0.375, -2.0]
TASKS = [
    [0.25, -0.5, 0.0, 1.0, -0.125, 0.75, -0.3125, 0.4375, 0.0625, -0.875],
    [0.5, 0.25, 0.75, -0.4375, 0.375, -1.0, 0.3125, -0.125, 0.5625, 0.1875],
    [-0.75, 0.125, 0.5, 0.25, 0.1875, 0.4375, 0.0, 1.0, -0.375, -0.5625],
]
# (options, expected weights)
CASES: list[tuple[dict[str, object], list[float]]] = [
    # The first and the seventh cancel exactly; mergekit gives 0.875 and 2.3125 there.
    ({"how": "ties"}, [0.5, -0.75, 1.625, 0.625, -1.21875, 0.71875, 2.0, -0.03125, 0.6875, -2.71875]),
    (
        {"how": "ties", "density": 0.5},
        [-0.25, -0.75, 1.625, 1.0, -1.5, 0.71875, 2.0, -0.03125, 0.9375, -2.71875],
    ),
    (
        {"how": "ties", "density": 0.3, "weights": (0.5, 0.3, 0.2), "scale": 0.7},
        [-0.025, -0.25, 1.525, 0.7, -1.5, 0.65, 2.0, -0.05, 0.76875, -2.55],
    ),
    (
        {"how": "linear", "weights": (0.5, 0.3, 0.2)},
        [0.625, -0.4, 1.325, 0.41875, -1.4125, 0.2875, 1.9375, -0.36875, 0.5, -2.49375],
    ),
]


@pytest.fixture
def deltas(tmp_path: Path) -> list[Path]:
    """One delta a task, of all ten weights, in fp64: every number above is exact in it."""
    paths = []
    for number, changes in enumerate(TASKS):
        model = nn.Linear(5, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.view(-1).copy_(torch.tensor(BASE))
        mask = Mask(layout_of(model), {"weight": torch.arange(10)}, 10, "hand", 1.0)
        previous = read_selected(model, mask)
        with torch.no_grad():
            model.weight.view(-1).add_(torch.tensor(changes))
        paths.append(tmp_path / f"{number}.safetensors")
        save_delta(paths[-1], model, mask, previous)
    return paths


@pytest.mark.parametrize(("options", "expected"), CASES)
def test_merging_is_what_mergekit_does(
    deltas: list[Path], tmp_path: Path, options: dict[str, object], expected: list[float]
) -> None:
    merge_deltas([open_delta(path) for path in deltas], Merge(**options), tmp_path / "merged")  # type: ignore[arg-type]
    change = open_delta(tmp_path / "merged").change("weight")
    found = torch.tensor(BASE, dtype=torch.float64)
    found[change.index] = change.values
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_lines_scales_by_depth_as_its_authors_do(tmp_path: Path) -> None:
    """Factors of arXiv 2410.17146: alpha + beta l / (L - 1) for block l from 0; alpha outside of blocks."""
    names = ["embed.weight", *(f"model.layers.{n}.up.weight" for n in range(5)), "norm.weight", "vision.layers.0.w"]
    assert depth_factors([*names, "vision.layers.2.w"], 0.2, 1.0) == pytest.approx(
        dict(zip(names, (0.2, 0.2, 0.4, 0.6, 0.8, 1.0, 0.2, 0.2), strict=True)) | {"vision.layers.2.w": 1.0}
    )
    assert depth_factors(["only.0.w", "norm"], 0.3, 1.0) == {"only.0.w": 0.3, "norm": 0.3}

    # Two tasks on four blocks: the weighted sum of their changes, by depth. A factor of 0 leaves the base's bits.
    paths = []
    for task in range(2):
        model = nn.Sequential(*(nn.Linear(2, 2, bias=False, dtype=torch.float64) for _ in range(4)))
        wrapped = nn.ModuleDict({"layers": model})
        with torch.no_grad():
            for param in wrapped.parameters():
                param.fill_(-0.0)
        index = {name: torch.arange(4) for name, _ in wrapped.named_parameters()}
        mask = Mask(layout_of(wrapped), index, 16, "hand", 1.0)
        previous = read_selected(wrapped, mask)
        with torch.no_grad():
            for number, param in enumerate(wrapped.parameters()):
                param.fill_(1.0 + number + 10 * task)
        paths.append(tmp_path / f"{task}.safetensors")
        save_delta(paths[-1], wrapped, mask, previous)
    merge = Merge(how="lines", weights=(0.5, 0.25), depth=(0.0, 1.5), scale=2.0)
    merge_deltas([open_delta(path) for path in paths], merge, tmp_path / "merged")
    for number in range(4):
        expected = 2.0 * (1.5 * number / 3) * (0.5 * (1 + number) + 0.25 * (11 + number))
        values = open_delta(tmp_path / "merged").change(f"layers.{number}.weight").values
        assert torch.allclose(values, torch.full((4,), expected, dtype=torch.float64))
        assert bool(torch.signbit(values).all()) == (number == 0)
    for wrong in ({"how": "linear", "depth": (0.2, 1.0)}, {"how": "lines", "density": 0.5}):
        with pytest.raises(UserError, match="has no meaning"):
            Merge(**wrong)  # type: ignore[arg-type]
