"""Whether a gradient is sampled follows the table of measurements, and nothing else."""

import pytest
import torch
from torch import nn

from piece_ds.ops import sampling_rule
from piece_ds.ops.sampling_rule import Row, largest_proven, max_density, of_size, read_table, rows_for
from piece_ds.runtime.errors import UserError
from piece_ds.update.gradients import GradientCollection, is_sparse
from piece_ds.zero.weights import SelectedWeights

H200 = "nvidia-h200"


def row(density: float, ratio: float, out: int = 1024, device: str = H200, dtype: str = "bf16") -> Row:
    return Row(device, "cuda", dtype, 1024, out, 1024, density, ratio)


@pytest.mark.parametrize(
    ("rows", "largest"),
    [
        ([], 0.0),
        ([row(0.001, 0.5)], 0.0),
        ([row(0.001, 3.0)], 0.003),
        ([row(0.001, 3.0), row(0.01, 2.0)], 0.02),
        ([row(0.001, 9.0), row(0.005, 0.9)], 0.005),  # a loss forbids what is proven beyond it
        ([row(0.001, 3.0), row(0.001, 6.0, out=4096)], 0.003),  # the worst shape decides
        ([row(0.001, 0.9), row(0.01, 2.0)], 0.0),  # nothing is proven below what loses
    ],
)
def test_what_rows_prove(rows: list[Row], largest: float) -> None:
    got = largest_proven(rows)
    assert got == pytest.approx(largest)
    assert all(got < row.density for row in rows if row.ratio < 1)


def test_a_weight_follows_the_largest_measured_size_that_it_reaches() -> None:
    small, large = [row(0.001, 0.5)], [row(0.001, 2.0, out=4096), row(0.01, 0.4, out=4096)]
    for num_elements, expected in (
        (1, small),
        (1 << 20, small),
        ((1 << 22) - 1, small),
        (1 << 22, large),
        (1 << 40, large),
    ):
        assert of_size(small + large, num_elements) == expected
    assert of_size([], 5) == []


def test_a_gpu_that_was_not_measured_follows_all_that_were() -> None:
    table = [
        row(0.001, 3.0),
        row(0.001, 0.5, device="nvidia-a100"),
        row(0.001, 2.0, dtype="fp32"),
        row(0.1, 9, device="cpu"),
    ]
    assert rows_for(table, H200, "cuda", torch.bfloat16) == table[:1]
    assert rows_for(table, H200, "cuda", torch.float16) == table[:1]
    assert rows_for(table, "nvidia-b200", "cuda", torch.bfloat16) == table[:2]
    assert rows_for(table, H200, "cuda", torch.float32) == table[2:3]
    assert rows_for(table, H200, "triton", torch.bfloat16) == []
    assert rows_for(table, "cpu", "cuda", torch.bfloat16) == table[3:]


def test_the_table_of_the_package_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row of a size loses below what that size's rows prove."""
    table = read_table(sampling_rule.TABLE)
    assert len({(r.device, r.provider, r.dtype, r.tokens, r.out, r.in_, r.density) for r in table}) == len(table)
    for kind in {r.device for r in table}:
        for provider in {r.provider for r in table if r.device == kind}:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                measured = rows_for(table, kind, provider, dtype)
                for size in {r.out * r.in_ for r in measured}:
                    rows = of_size(measured, size)
                    limit = largest_proven(rows)
                    lost = [r for r in rows if r.ratio < 1 and r.density <= limit]
                    assert not lost, lost
    # In bf16 the tensor cores win below 16 M elements of a weight, in fp32 and on a CPU they do not.
    sizes = {
        size: largest_proven(of_size(rows_for(table, H200, "cuda", torch.bfloat16), size)) for size in (1, 1 << 24)
    }
    assert sizes[1] == 0.0
    assert sizes[1 << 24] > 0.001
    assert largest_proven(rows_for(table, H200, "cuda", torch.float32)) >= 0.001
    assert max_density("cpu", torch.bfloat16, 1 << 20) >= 0.001
    monkeypatch.setattr("piece_ds.ops.provider", lambda op, device: "triton")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H200")
    assert max_density("cuda", torch.bfloat16, 1 << 24) == 0.0


@pytest.mark.parametrize("shape", [(6, 5), (4, 6, 5)])
def test_of_stacked_experts_the_size_of_one_counts(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    asked = []

    def most(device: object, dtype: torch.dtype, num_elements: int) -> float:
        asked.append((dtype, num_elements))
        return 0.5

    monkeypatch.setattr("piece_ds.update.gradients.max_density", most)
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    half = weight.numel() // 2
    assert is_sparse(SelectedWeights(weight, torch.arange(half)), torch.device("cpu"))
    assert not is_sparse(SelectedWeights(weight, torch.arange(half + 1)), torch.device("cpu"))
    assert asked == [(torch.bfloat16, 30)] * 2


def test_a_device_without_ops_is_refused() -> None:
    for device in ("meta", "xpu"):
        with pytest.raises(UserError, match="no kernels for device"):
            max_density(device, torch.float32, 10)


@pytest.mark.parametrize("gradient", [None, 1, True, "", "Dense"])
def test_what_is_no_way_to_take_gradients_is_refused(gradient: object) -> None:
    with pytest.raises(UserError, match="known: auto, dense"):
        GradientCollection(nn.Linear(2, 2), {}, [], gradient)  # type: ignore[arg-type]
