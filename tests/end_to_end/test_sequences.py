"""`piece_ds train --sequence_parallel_size 2`: the masks, losses and weights of ranks that share nothing."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import Results, result_of, run_job
from support.launches import CONFIGS, mask_index
from support.stream_runs import ACCUMULATION, LEARNING_RATE, NUM_STEPS, Material

from piece_ds.deltas.delta import open_delta

pytestmark = pytest.mark.slow

SHARED = {"sequence_parallel_size": 2, "importance_batch_size": 2}
STREAM = {"eval_strategy": "steps", "eval_steps": 2, "max_eval_samples": 4}
# Name -> changes of the flags, on two ranks that share rows. The stream has two engines, and generates between them.
RUNS = {
    "zero3-compact": STREAM,
    "zero2-masked": {"deepspeed": CONFIGS / "zero2.json", "update_mode": "masked", "tasks": "text"},
    "zero0-mean": {"deepspeed": CONFIGS / "zero0.json", "average_tokens_across_devices": False, "tasks": "letter"},
}
# All that general text serves: importance of a method and of scaled steps, replay and divergence.
GENERAL = {
    "method": "piece-ratio",
    "step_scale": "general",
    "general_replay": 0.5,
    "general_kl": 2.0,
    "tasks": "letter",
}


def flags(material: Material, name: str, **changes: object) -> list[str]:
    return material.stream_flags(name, **{"importance_batch_size": 2, **changes, "report_to": "none"})


def run(folder: Path, num_ranks: int, jobs: dict[str, list[str]]) -> Results:
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps(jobs))
    return run_job("support.train_job", num_ranks, folder)


@pytest.fixture(scope="module")
def runs(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Each run with shared rows on two ranks, and the same steps on two ranks and on one without."""
    root = tmp_path_factory.mktemp("sequences")
    general = {**GENERAL, "general_text": material.root / "general.jsonl"}
    every = RUNS | {"zero3-general": general, "zero2-general": {**RUNS["zero2-masked"], **general}}
    shared = {
        f"shared-{name}": flags(material, f"shared-{name}", **changes, **SHARED) for name, changes in every.items()
    }
    apart = {f"apart-{name}": flags(material, f"apart-{name}", **changes) for name, changes in every.items()}
    alone = {"gradient_accumulation_steps": 2 * ACCUMULATION, **RUNS["zero3-compact"]}
    one = {"alone-zero3-compact": flags(material, "alone-zero3-compact", **alone)}
    # A process whose ranks have shared rows keeps DeepSpeed's groups, so the others are processes of their own.
    return run(root / "shared", 2, shared) | run(root / "apart", 2, apart) | run(root / "one", 1, one)


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def assert_same(material: Material, runs: Results, first: str, second: str) -> None:
    """Masks equal; losses within 1e-5 and weights within 1e-3 of the largest update."""
    result_of(runs, first)
    result_of(runs, second)
    folders = [material.out(name) for name in (first, second)]
    tasks = sorted(path.name for path in folders[0].glob("0*-*"))
    assert tasks == sorted(path.name for path in folders[1].glob("0*-*"))
    for task in tasks:
        one, other = (mask_index(folder / task / "mask.safetensors") for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), task
        logs = [log_of(folder / task) for folder in folders]
        assert len(logs[0]) == len(logs[1]) == NUM_STEPS
        for row, expected in zip(*logs, strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), task
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), task
        deltas = [open_delta(folder / task / "delta.safetensors") for folder in folders]
        for name in deltas[0].shapes:
            values, expected_values = (delta.change(name).values for delta in deltas)
            assert (values - expected_values).abs().max() <= 1e-3 * LEARNING_RATE * NUM_STEPS, (task, name)
    losses = [json.loads((folder / "results.json").read_text())["matrix"]["loss"]["after"] for folder in folders]
    for row, expected_row in zip(*losses, strict=True):
        assert [loss or 0 for loss in row] == pytest.approx([loss or 0 for loss in expected_row], rel=1e-4)
    # Before training weights are the same, so what padded prompts are answered is too.
    before = [sorted((folder / "predictions" / "before").iterdir()) for folder in folders]
    assert before[0]
    assert [path.read_bytes() for path in before[0]] == [path.read_bytes() for path in before[1]]


@pytest.mark.parametrize("name", [*RUNS, "zero3-general", "zero2-general"])
def test_ranks_that_share_rows_train_as_those_that_do_not(material: Material, runs: Results, name: str) -> None:
    assert_same(material, runs, f"shared-{name}", f"apart-{name}")


def test_two_ranks_that_share_rows_train_as_one(material: Material, runs: Results) -> None:
    assert_same(material, runs, "shared-zero3-compact", "alone-zero3-compact")
