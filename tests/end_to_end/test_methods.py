"""Every method through the launch script's work: a stream of two tasks on two ranks; some stopped in between."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.fine_tuning import EMBEDDING
from support.jobs import Results, result_of, run_job
from support.launches import CONFIGS, changed, mask_index, same_bits, tree, weights
from support.stream_runs import NUM_RANKS, RATIO, Material

from piece_ds.methods.registry import METHODS

FULL_STEP = 1e-3  # AdamW's first step moves a weight by the rate, whatever its gradient

FAST = ("hft", "o-lora", "ewc")  # freezing by name, adapters, a term in the gradient
RESUMED = ("lora", "o-lora", "peft", "ewc", "gem", "piece-ratio", "hft")  # what lasts from task to task


def runs_of(material: Material, methods: tuple[str, ...], config: str, bf16: bool, stops: bool) -> dict[str, dict]:
    runs = {}
    for method in methods:
        # piece-ratio by the flag's first name.
        flag = "general_importance_file" if method == "piece-ratio" else "general_text"
        also = {flag: material.root / "general.jsonl"} if METHODS[method].needs_general_text else {}
        if method == "peft":  # whose adapter takes a part of the base weights out, and reads their norms
            peft = {"peft_type": "LORA", "target_modules": "all-linear", "use_dora": True, "init_lora_weights": "pissa"}
            (material.root / "peft.json").write_text(json.dumps(peft))
            also = {"peft_config": material.root / "peft.json"}
        for stop in (False, True) if stops and method in RESUMED else (False,):
            name = f"{method}-{config}{'-bf16' if bf16 else ''}{'-stopped' if stop else ''}"
            if bf16:
                also |= {"bf16": True}
            flags = material.stream_flags(
                name,
                method=method,
                deepspeed=CONFIGS / f"{config}.json",
                max_steps=2,
                max_eval_samples=2,
                lora_dropout=0.0,
                ewc_lambda=1e3,
                **also,
            )
            runs[name] = {"flags": flags, "stop": stop}
    return runs


def run_all(runs: dict[str, dict], folder: Path) -> Results:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    return run_job("support.method_job", NUM_RANKS, folder)


@pytest.fixture(scope="session")
def fast_methods(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs = runs_of(material, FAST, "zero3", False, False)
    plain = {"method": "seqft", "learning_rate": FULL_STEP, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0}
    text = material.root / "general.jsonl"
    scaled = {**plain, "step_scale": "general", "general_text": text, "importance_batch_size": 4}
    for name, own in (("plain-steps", plain), ("scaled-steps", scaled)):
        runs[name] = {"flags": material.short_flags(name, **own), "stop": False}
    return run_all(runs, tmp_path_factory.mktemp("methods"))


@pytest.fixture(scope="session")
def all_methods(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every method at ZeRO-3 with stops, and at ZeRO-1 in bf16 and ZeRO-2."""
    every = tuple(METHODS)
    runs = runs_of(material, every, "zero2", False, True) | runs_of(material, every, "zero1", True, False)
    return run_all(
        runs | runs_of(material, tuple(set(every) - set(FAST)), "zero3", False, False),
        tmp_path_factory.mktemp("methods_slow"),
    )


def finished(material: Material, results: Results, name: str) -> Path:
    """The run's folder; its matrix is complete and every figure a number."""
    result_of(results, name)
    folder = material.out(name)
    values = json.loads((folder / "results.json").read_text())
    assert values["finished"] == 2
    rows = values["matrix"]["loss"]["after"]
    assert all(
        value is not None and value > 0 for row, count in zip(rows, (1, 2), strict=True) for value in row[:count]
    )
    assert (folder / "report.html").is_file()
    return folder


def models(material: Material, folder: Path) -> tuple[Path, Path, Path]:
    return material.base, folder / "00-letter" / "model", folder / "01-text" / "model"


def assert_masks_hold(material: Material, folder: Path) -> None:
    for task, before, after in zip(
        ("00-letter", "01-text"), models(material, folder)[:2], models(material, folder)[1:], strict=True
    ):
        index = mask_index(folder / task / "mask.safetensors")
        moved = changed(weights(before), weights(after))
        assert moved
        for name, positions in moved.items():
            assert torch.isin(positions, index[name]).all(), name


def check(material: Material, folder: Path, method: str) -> None:
    """What holds for every run of a method."""
    base, first, second = (weights(path) for path in models(material, folder))
    assert first.keys() == second.keys() == base.keys()
    assert torch.equal(base[EMBEDDING].to(second[EMBEDDING].dtype), second[EMBEDDING])
    if METHODS[method].has_mask:
        assert_masks_hold(material, folder)
        return
    assert not {"mask.safetensors", "delta.safetensors"} & (tree(folder / "00-letter") | tree(folder / "01-text"))
    assert not list(folder.rglob("teacher.bin"))
    moved = changed(first, second)
    if METHODS[method].baseline.saves_itself:  # the adapter's matrices, merged; lm_head is the output layer
        assert moved.keys() == {name for name in base if "_proj" in name}
        assert (folder / "01-text" / "adapter").is_dir()
    else:
        assert moved.keys() >= base.keys() - {EMBEDDING}


@pytest.mark.parametrize("method", FAST)
def test_a_method_runs_a_stream_and_leaves_what_it_promises(
    material: Material, fast_methods: Results, method: str
) -> None:
    check(material, finished(material, fast_methods, f"{method}-zero3"), method)


def test_steps_of_all_weights_are_scaled_if_the_run_says_so(material: Material, fast_methods: Results) -> None:
    """The factor of the median weight is sqrt(1 / 2), that of all is at most 1; the embedding keeps 1."""
    before, medians = weights(material.base), {}
    for name in ("plain-steps", "scaled-steps"):
        result_of(fast_methods, name)
        after = weights(material.out(name) / "00-train" / "model")
        moved = [(after[key] - before[key]).abs().flatten() / FULL_STEP for key in before if key != EMBEDDING]
        assert float(torch.cat(moved).max()) < 1.01, name
        medians[name] = float(torch.cat(moved).median())
    assert medians["plain-steps"] == pytest.approx(1.0, abs=0.02)
    assert medians["scaled-steps"] == pytest.approx(0.5**0.5, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["zero1-bf16", "zero2", "zero3"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_at_every_stage(
    material: Material, all_methods: Results, request: pytest.FixtureRequest, method: str, setting: str
) -> None:
    fast = setting == "zero3" and method in FAST
    results = request.getfixturevalue("fast_methods") if fast else all_methods
    folder = finished(material, results, f"{method}-{setting}")
    if setting != "zero1-bf16":  # the base model's files are fp32
        check(material, folder, method)


@pytest.mark.slow
@pytest.mark.parametrize("method", RESUMED)
def test_a_stream_stopped_between_tasks_goes_on_with_the_same_bits(
    material: Material, all_methods: Results, method: str
) -> None:
    straight, stopped = (finished(material, all_methods, f"{method}-zero2{end}") for end in ("", "-stopped"))
    assert same_bits(weights(straight / "01-text" / "model"), weights(stopped / "01-text" / "model"))


@pytest.mark.slow
def test_disjoint_masks_of_a_stream_share_nothing(material: Material, all_methods: Results) -> None:
    folder = finished(material, all_methods, "piece-s-disjoint-zero2")
    first, second = (mask_index(folder / task / "mask.safetensors") for task in ("00-letter", "01-text"))
    assert not any(torch.isin(first[name], second[name]).any() for name in first.keys() & second.keys())


def test_hft_rests_another_half_in_the_next_task(material: Material, fast_methods: Results) -> None:
    folder = finished(material, fast_methods, "hft-zero3")
    first, second = (mask_index(folder / task / "mask.safetensors") for task in ("00-letter", "01-text"))
    assert first.keys() != second.keys()
    results = json.loads((folder / "results.json").read_text())
    assert 0.3 < results["ratio"] < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lift", "migu", "shira", "piece-ratio", "piece-s-disjoint"])
def test_selections_by_ratio_have_the_budget_of_piece(material: Material, all_methods: Results, method: str) -> None:
    folder = finished(material, all_methods, f"{method}-zero2")
    with safe_open(folder / "00-letter" / "mask.safetensors", framework="pt") as file:
        found = file.metadata()
    assert int(found["selected"]) == int(RATIO * int(found["total"]))
    assert found["method"] == method


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lift", "migu", "shira", "piece-s-disjoint", "layernorm", "hft"])
def test_masks_do_not_depend_on_the_stage(
    material: Material, all_methods: Results, request: pytest.FixtureRequest, method: str
) -> None:
    results = request.getfixturevalue("fast_methods") if method in FAST else all_methods
    two = finished(material, all_methods, f"{method}-zero2") / "00-letter" / "mask.safetensors"
    three = finished(material, results, f"{method}-zero3") / "00-letter" / "mask.safetensors"
    first, second = mask_index(two), mask_index(three)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
