"""A processor that multiplies bf16 slowly: who finds out, and what trains in fp32 instead."""

import logging
import platform
from pathlib import Path

import pytest
import torch

from piece_ds.cli import office_demo
from piece_ds.config.settings import load_settings
from piece_ds.demo.office.recipe import OfficeRecipe
from piece_ds.demo.office.write import OfficePaths
from piece_ds.preflight.inputs import with_precision
from piece_ds.runtime.processor import bf16_is_slow
from piece_ds.training.run_folder import RunFolder


def processor(monkeypatch: pytest.MonkeyPatch, machine: str, capability: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


@pytest.mark.parametrize(
    ("machine", "capability", "slow"),
    [
        ("x86_64", "AVX2", True),
        ("AMD64", "DEFAULT", True),
        ("x86_64", "AVX512", False),
        ("aarch64", "DEFAULT", False),
        ("arm64", "SVE256", False),
    ],
)
def test_an_x86_processor_without_avx512_is_slow(
    monkeypatch: pytest.MonkeyPatch, machine: str, capability: str, slow: bool
) -> None:
    processor(monkeypatch, machine, capability)
    assert bf16_is_slow() is slow


@pytest.mark.parametrize(
    ("flags", "dtype", "capability", "said"),
    [
        ([], torch.bfloat16, "AVX2", True),
        (["--bf16"], torch.float32, "AVX2", True),
        ([], torch.float32, "AVX2", False),
        ([], torch.bfloat16, "AVX512", False),
    ],
)
def test_a_run_in_bf16_is_told_what_is_faster(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    flags: list[str],
    dtype: torch.dtype,
    capability: str,
    said: bool,
) -> None:
    settings = load_settings(["--output_dir", str(tmp_path), *flags])
    processor(monkeypatch, "x86_64", capability)
    with caplog.at_level(logging.WARNING):
        chosen, used = with_precision(settings, dtype)
    assert ("--dtype float32" in caplog.text) is said
    assert chosen.training_arguments().bf16 == (used == torch.bfloat16) == (bool(flags) or dtype == torch.bfloat16)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_the_office_demo_trains_in_fp32_where_bf16_is_slow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str
) -> None:
    processor(monkeypatch, "x86_64", capability)
    paths = OfficePaths(task_dir=tmp_path, general_file=tmp_path / "general.jsonl")
    flags = office_demo._common_flags(paths, "smollm2-135m", OfficeRecipe(), RunFolder(tmp_path))
    assert flags.get("dtype") == ("float32" if capability == "AVX2" else None)


@pytest.mark.parametrize(("capability", "tasks"), [("AVX2", 1), ("AVX512", 2)])
def test_the_office_demo_is_shorter_where_bf16_is_slow_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: str, tasks: int
) -> None:
    processor(monkeypatch, "x86_64", capability)
    with caplog.at_level(logging.WARNING):
        recipe = office_demo._recipe_here()
    assert len(recipe.tasks) == tasks
    assert ("1 task and 16 steps; elsewhere 2 tasks of 24 steps" in caplog.text) is (tasks == 1)
