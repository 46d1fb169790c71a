"""Scaled steps, replay and divergence together, in runs on two ranks: every stage, both modes, stopped and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.engines import FP32_ACCUMULATION
from support.jobs import Results, result_of, run_job
from support.launches import CONFIGS, same_bits, weights, write_rows
from support.stream_runs import ACCUMULATION, BATCH_SIZE, NUM_RANKS, NUM_STEPS, Material

pytestmark = pytest.mark.slow

TASK = "00-train"
STAGES = ("zero0", "zero2", "zero3", "zero2_offload", "zero3_offload")
REENTRANT, NON_REENTRANT = ({"use_reentrant": reentrant} for reentrant in (True, False))
TO_THE_BIT = ("zero2", "zero3")

MODES = ("masked", "compact")


def with_fp32_sums(material: Material, stage: str) -> Path:
    """A configuration in which masked mode adds gradients up in fp32, as compact mode always does."""
    config = {**json.loads((CONFIGS / f"{stage}.json").read_text()), **FP32_ACCUMULATION}
    return write_rows(material.root / f"{stage}-fp32.json", config)


@pytest.fixture(scope="module")
def runs(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Results:
    text = write_rows(material.root / "kept.jsonl", [{"text": f"plain text number {i} of eleven"} for i in range(11)])
    general = {
        "method": "piece-ratio",
        "general_text": text,
        "step_scale": "general",
        "general_replay": 0.5,
        "general_kl": 2.0,
        "learning_rate": 0.03,
        "max_steps": 2,
        "report_to": "none",
    }
    bf16 = {"model_name_or_path": material.root / "base_bf16", "max_steps": 3}
    adapter = {"method": "lora", "step_scale": None}

    def short(name: str, **changes: object) -> list[str]:
        return material.short_flags(name, **{**general, **changes})

    jobs = {f"general-{stage}": short(f"general-{stage}", deepspeed=CONFIGS / f"{stage}.json") for stage in STAGES}
    for stage in TO_THE_BIT:
        own = {"deepspeed": with_fp32_sums(material, stage), "selected_gradient": "dense", **bf16}
        jobs |= {f"bf16-{stage}-{mode}": short(f"bf16-{stage}-{mode}", **own, update_mode=mode) for mode in MODES}
    for name, kwargs in (("reentrant", REENTRANT), ("non-reentrant", NON_REENTRANT)):
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": json.dumps(kwargs)}
        jobs[f"general-{name}"] = short(f"general-{name}", **checkpointing)
    for name, own in {"seqft": {"method": "seqft"}, "lora": adapter, "kl": {"general_replay": None}}.items():
        jobs[f"general-{name}"] = short(f"general-{name}", **own)
    stream = {**general, "max_steps": NUM_STEPS, "max_eval_samples": 2, "save_model": "last"}
    jobs["general-whole"] = material.stream_flags("general-whole", **stream)
    stopped = material.stream_flags("general-stopped", **{**stream, "report_to": "stopper"})
    resumed = [*stopped, "--resume_from_checkpoint", "True"]
    jobs |= {"general-stopped": stopped, "general-stopped-again": resumed, "general-resumed": resumed}
    job = tmp_path_factory.mktemp("general")
    (job / "runs.json").write_text(json.dumps(jobs))
    return run_job("support.train_job", NUM_RANKS, job)


def task_folder(material: Material, runs: Results, name: str, task: str = TASK) -> Path:
    result_of(runs, name)
    return material.out(name) / task


def log_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "general_kl" in row]


def test_every_stage_and_offload_trains_the_same(material: Material, runs: Results) -> None:
    """Up to the rounding of sums: values of the same positions, and what the log says of general text."""
    want = load_file(task_folder(material, runs, "general-zero0") / "delta.safetensors")
    largest = max(float((want[k] - want[f"{k[:-7]}.previous"]).abs().max()) for k in want if k.endswith(".values"))
    assert largest > 0.01
    for stage in (*STAGES[1:], "reentrant", "non-reentrant"):
        folder = task_folder(material, runs, f"general-{stage}")
        found = load_file(folder / "delta.safetensors")
        assert found.keys() == want.keys(), stage
        for name in want:
            assert float((found[name] - want[name]).abs().max()) <= 1e-3 * largest, (stage, name)
        for row, other in zip(log_of(folder), log_of(material.out("general-zero0") / TASK), strict=True):
            assert row["general_kl"] == pytest.approx(other["general_kl"], rel=1e-2, abs=1e-6), stage
            assert row["general_loss"] == pytest.approx(other["general_loss"], rel=1e-3), stage


def test_compact_mode_trains_the_bits_of_masked_mode(material: Material, runs: Results) -> None:
    for stage in TO_THE_BIT:
        masked, compact = (weights(task_folder(material, runs, f"bf16-{stage}-{mode}") / "model") for mode in MODES)
        assert same_bits(masked, compact), stage


def test_stopped_in_both_tasks_and_resumed_a_run_ends_with_the_same_bits(material: Material, runs: Results) -> None:
    assert result_of(runs, "general-stopped")["stopped"]
    assert result_of(runs, "general-stopped-again")["stopped"]
    for task in ("00-letter", "01-text"):
        result_of(runs, "general-resumed")
        whole, resumed = (task_folder(material, runs, f"general-{name}", task) for name in ("whole", "stopped"))
        first, second = (load_file(folder / "delta.safetensors") for folder in (whole, resumed))
        assert first.keys() == second.keys()
        assert all(same_bits({"": first[name]}, {"": second[name]}) for name in first), task
        kept = ("step", "loss", "general_tokens", "general_loss", "general_kl")
        logs = [[{key: row[key] for key in kept} for row in log_of(folder)] for folder in (whole, resumed)]
        assert logs[0] == logs[1]
        assert len(logs[0]) == NUM_STEPS
    assert same_bits(weights(whole / "model"), weights(resumed / "model"))
    assert not (material.out("general-whole") / "general_logits").exists()


def test_the_log_tells_general_texts_part(material: Material, runs: Results) -> None:
    for name in ("kl", "seqft", "lora", "zero3"):
        folder = task_folder(material, runs, f"general-{name}")
        log = log_of(folder)
        assert abs(log[0]["general_kl"]) < 1e-5, name  # the first step's forward passes are the base model's
        assert log[-1]["general_kl"] > 1e-4, name
        rows_a_step = NUM_RANKS * ACCUMULATION * max(1, BATCH_SIZE // (4 if name == "kl" else 2))
        assert log[0]["general_tokens"] >= 10 * rows_a_step, name
        base = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert next(row for row in base if row.get("event") == "base logits")["bytes"] > 0
        cost = json.loads((material.out(f"general-{name}") / "results.json").read_text())["cost"]["train"]
        assert 0 < cost["general_tokens_per_second"] < cost["trained_tokens_per_second"]
