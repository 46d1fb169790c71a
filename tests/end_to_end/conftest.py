"""The runs that the end-to-end tests read: few, because each costs imports on every rank."""

import json
from pathlib import Path

import pytest
import torch
from support.jobs import Results, run_job
from support.launches import launch, make_model_folder, make_tasks, succeeded, write_rows
from support.stream_runs import NUM_RANKS, Material, slow_variant_flags, variant_flags


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    root = tmp_path_factory.mktemp("end_to_end")
    make_model_folder(root / "base")
    make_model_folder(root / "base_bf16", torch.bfloat16)
    make_tasks(root / "tasks")
    write_rows(root / "general.jsonl", [{"text": f"plain text number {i}"} for i in range(4)])
    return Material(root)


@pytest.fixture(scope="session")
def stream(material: Material) -> Path:
    """A stream of two tasks as a user launches it: deepspeed, two ranks, ZeRO-3."""
    flags = material.stream_flags("stream", general_file=material.root / "general.jsonl")
    run = succeeded(launch("deepspeed", NUM_RANKS, "train.py", *flags))
    (material.out("stream") / "stdout.txt").write_text(run.stdout)
    return material.out("stream")


@pytest.fixture(scope="session")
def variants(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The runs of variant_flags() on two ranks, one after another; name -> {} or {'error': ...}."""
    return _run_variants(variant_flags(material), tmp_path_factory.mktemp("variants"))


@pytest.fixture(scope="session")
def slow_variants(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The same for slow_variant_flags()."""
    return _run_variants(slow_variant_flags(material), tmp_path_factory.mktemp("slow_variants"))


def _run_variants(runs: dict[str, list[str]], job: Path) -> Results:
    (job / "runs.json").write_text(json.dumps(runs))
    return run_job("support.train_job", NUM_RANKS, job)
