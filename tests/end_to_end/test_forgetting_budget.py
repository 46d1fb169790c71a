"""--forgetting_budget in runs on two ranks: what is kept fits the budget, and the whole task is still in the file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.deltas import sha256_of
from support.jobs import Results, result_of, run_job
from support.launches import CONFIGS, weights, write_rows
from support.stream_runs import NUM_RANKS, Material

from piece_ds.__main__ import main

pytestmark = pytest.mark.slow  # limit_forgetting() alone is in tests/unit/test_forgetting_budget.py

TASK, BUDGET = "00-train", 0.1
TIGHT = ("zero3", "zero2-masked", "none-fits")


@pytest.fixture(scope="module")
def runs(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Results:
    text = write_rows(material.root / "judged.jsonl", [{"text": f"plain text number {i} of seven"} for i in range(7)])
    flags = {"general_file": text, "max_steps": 3, "learning_rate": 0.05, "report_to": "none"}
    zero2 = {"deepspeed": CONFIGS / "zero2.json", "update_mode": "masked"}
    jobs = {
        "whole": material.short_flags("whole", **flags),
        "loose": material.short_flags("loose", **flags, forgetting_budget=1000.0),
        "zero3": material.short_flags("zero3", **flags, forgetting_budget=BUDGET),
        "zero2-masked": material.short_flags("zero2-masked", **flags, **zero2, forgetting_budget=BUDGET),
        "none-fits": material.short_flags("none-fits", **flags, forgetting_budget=0.0),
    }
    lora = {"method": "lora", "lora_dropout": 0.0, "learning_rate": 0.5}
    for name, own in {"seqft": {"method": "seqft"}, "lora": lora}.items():
        jobs[f"{name}-unlimited"] = material.short_flags(f"{name}-unlimited", **{**flags, **own})
        for stage in ("zero2", "zero3"):
            stage_flags = {"deepspeed": CONFIGS / f"{stage}.json", "forgetting_budget": BUDGET}
            jobs[f"{name}-{stage}"] = material.short_flags(f"{name}-{stage}", **{**flags, **own, **stage_flags})
    job = tmp_path_factory.mktemp("budgets")
    (job / "runs.json").write_text(json.dumps(jobs))
    return run_job("support.train_job", NUM_RANKS, job)


def folder_of(material: Material, runs: Results, name: str) -> Path:
    result_of(runs, name)
    return material.out(name) / TASK


def found(material: Material, name: str) -> dict[str, Any]:
    return json.loads((material.out(name) / "results.json").read_text())["forgetting"]["train"]


def delta(*arguments: object) -> None:
    main(["delta", *map(str, arguments)])


def test_a_budget_that_the_task_fits_changes_nothing(material: Material, runs: Results) -> None:
    whole, loose = (folder_of(material, runs, name) for name in ("whole", "loose"))
    assert sha256_of(whole / "model") == sha256_of(loose / "model")
    first, second = load_file(whole / "delta.safetensors"), load_file(loose / "delta.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert found(material, "loose")["delta_scale"] == 1.0
    assert "forgetting" not in json.loads((material.out("whole") / "results.json").read_text())


@pytest.mark.parametrize("name", TIGHT)
def test_what_is_kept_fits_and_model_and_delta_hold_it(
    material: Material, runs: Results, tmp_path: Path, name: str
) -> None:
    folder, got = folder_of(material, runs, name), found(material, name)
    budget = got["curve"]["budget"]
    assert 0.0 <= got["delta_scale"] < 1.0
    assert got["search"]["after"] - got["search"]["before"] <= budget
    assert got["search"]["unscaled"] - got["search"]["before"] > budget  # the whole task would not
    assert len(got["curve"]["trials"]) <= 6
    for half in ("search", "report"):
        assert got[half].keys() == {"before", "after", "unscaled"}
    assert got["search"] != got["report"]
    delta("apply", material.base, folder / "delta.safetensors", "--output", tmp_path / "applied")
    for file, sha in sha256_of(folder / "model").items():
        if file.endswith(".safetensors"):
            assert sha == sha256_of(tmp_path / "applied")[file]
    with safe_open(folder / "delta.safetensors", framework="pt") as file:
        assert float(file.metadata()["scale"]) == got["delta_scale"]


def test_the_whole_task_comes_back_from_the_scaled_file(material: Material, runs: Results, tmp_path: Path) -> None:
    whole = load_file(folder_of(material, runs, "whole") / "delta.safetensors")
    for name in ("zero3", "none-fits"):
        scaled = folder_of(material, runs, name) / "delta.safetensors"
        delta("scale", scaled, "--alpha", 1, "--output", tmp_path / name)
        again = load_file(tmp_path / name)
        assert again.keys() == whole.keys()
        assert all(torch.equal(again[part], whole[part]) for part in whole)


@pytest.mark.parametrize(("method", "stage"), [("seqft", "zero3"), ("seqft", "zero2"), ("lora", "zero3")])
def test_a_method_without_a_mask_keeps_a_part_of_its_whole_change(
    material: Material, runs: Results, method: str, stage: str
) -> None:
    """At the run's own stage, the model is base + alpha * (unlimited - base), to the bit for plain weights."""
    folder = folder_of(material, runs, f"{method}-{stage}")
    got = found(material, f"{method}-{stage}")
    assert 0.0 < got["delta_scale"] <= 1.0
    assert got["delta_scale"] < 1.0 or method == "lora"  # what LoRA learns here lowers the general loss
    assert got["search"]["after"] - got["search"]["before"] <= BUDGET
    masked = found(material, "zero3")["search"]["before"]
    assert got["search"]["before"] == pytest.approx(masked, rel=1e-5)  # alpha 0 is the base model
    base, unlimited = weights(material.base), weights(folder_of(material, runs, f"{method}-unlimited") / "model")
    for name, values in weights(folder / "model").items():
        whole = unlimited[name].double() - base[name].double()
        want = (base[name].double() + got["delta_scale"] * whole).to(values.dtype)
        # Another stage adds gradients in another order.
        torch.testing.assert_close(values, want, rtol=0, atol=2e-4 * float(whole.abs().max()) + 1e-7)
        if (method, stage) == ("seqft", "zero3"):
            assert torch.equal(values, want), name
