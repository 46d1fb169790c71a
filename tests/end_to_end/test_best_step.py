"""The best step on two ranks: the bits of a run that ended there, and the delta between them and the base model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import Results, result_of, run_job
from support.launches import CONFIGS, make_rows, same_bits, weights, write_rows
from support.stream_runs import NUM_RANKS, Material

from piece_ds.__main__ import main

pytestmark = pytest.mark.slow  # one process is in tests/unit/test_validation.py

TASK, NUM_STEPS = "00-train", 6
MODES: dict[str, dict[str, object]] = {
    "zero3-compact": {"deepspeed": CONFIGS / "zero3.json"},
    "zero2-compact": {"deepspeed": CONFIGS / "zero2.json"},
    "zero3-masked": {"deepspeed": CONFIGS / "zero3.json", "update_mode": "masked"},
    "zero1-masked": {"deepspeed": CONFIGS / "zero1.json", "update_mode": "masked"},
}


def run(material: Material, job: Path, steps: dict[str, int], **best: object) -> Results:
    """Each mode, for a number of steps, into out(MODE-NUMBER)."""
    train = write_rows(material.root / "one" / "train.json", make_rows(0, 32, ("A",)))
    held_out = write_rows(material.root / "one" / "eval.json", make_rows(1, 6, ("A", "B")))
    flags = {"train_file": train, "eval_file": held_out, "learning_rate": 0.2, "report_to": "none", **best}
    jobs = {
        name: material.short_flags(f"{name}-{steps[name]}", **flags, **mode, max_steps=steps[name])
        for name, mode in MODES.items()
    }
    job.mkdir()
    (job / "runs.json").write_text(json.dumps(jobs))
    return run_job("support.train_job", NUM_RANKS, job)


def found(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())["validation"]["train"]


@pytest.fixture(scope="module")
def folders(material: Material, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Mode -> the folder of a run that kept its best step, and of one that ended there."""
    job, whole = tmp_path_factory.mktemp("best"), dict.fromkeys(MODES, NUM_STEPS)
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_eval_samples": 6}
    results = run(material, job / "best", whole, **best)
    assert all(result_of(results, name) == {} for name in MODES)
    kept = {name: material.out(f"{name}-{NUM_STEPS}") for name in MODES}
    steps = {name: found(folder)["used_step"] for name, folder in kept.items()}
    assert all(0 < step < NUM_STEPS for step in steps.values()), steps
    ended = run(material, job / "ended", steps)
    return {
        name: (kept[name], material.out(f"{name}-{steps[name]}"))
        for name in MODES
        if result_of(ended, name) is not None
    }


@pytest.mark.parametrize("name", MODES)
def test_the_best_step_is_kept_to_the_bit(
    material: Material, folders: dict[str, tuple[Path, Path]], tmp_path: Path, name: str
) -> None:
    kept, ended = folders[name]
    assert same_bits(weights(kept / TASK / "model"), weights(ended / TASK / "model"))
    deltas = [load_file(folder / TASK / "delta.safetensors") for folder in (kept, ended)]
    assert deltas[0].keys() == deltas[1].keys()
    assert all(torch.equal(deltas[0][part], deltas[1][part]) for part in deltas[0])
    main(["delta", "revert", str(kept / TASK / "model"), str(kept / TASK / "delta.safetensors"),
          "--output", str(tmp_path / "base")])  # fmt: skip
    assert same_bits(weights(tmp_path / "base"), weights(material.base))
