"""A task ends with its best step: the bits of a run that ended there, at every stage, also when it was interrupted."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.deltas import sha256_of
from support.engines import whole_weights
from support.launches import make_model_folder, make_rows, one_process, same_bits, weights, write_rows
from support.models import make_model
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from piece_ds import PieceCallback
from piece_ds.__main__ import main
from piece_ds.cli.run import train
from piece_ds.config.settings import load_settings
from piece_ds.runtime.signals import Preempted
from piece_ds.training.trainer_callbacks import StopAtStep

pytestmark = pytest.mark.heavy

TASK, NUM_STEPS = "00-train", 8
BEST = ("--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All training answers are A, one held-out answer in two is B: the held-out loss falls, then rises."""
    with one_process():
        made = tmp_path_factory.mktemp("validation")
        make_model_folder(made / "model")
        write_rows(made / "train.jsonl", make_rows(0, 32, ("A",)))
        write_rows(made / "eval.jsonl", make_rows(1, 6, ("A", "B")))
        write_rows(made / "general.jsonl", [{"text": f"plain text number {i} of seven"} for i in range(7)])
        yield made
    # Else models of later tests would be partitioned: transformers remembers the last run's ZeRO-3.
    unset_hf_deepspeed_config()


def run(folder: Path, name: str, *flags: str, num_steps: int = NUM_STEPS) -> Path:
    argv = [
        *("--model_name_or_path", str(folder / "model"), "--train_file", str(folder / "train.jsonl")),
        *("--eval_file", str(folder / "eval.jsonl"), "--deepspeed", "zero2", "--output_dir", str(folder / name)),
        *("--max_steps", str(num_steps), "--per_device_train_batch_size", "4", "--learning_rate", "0.2"),
        *("--lr_scheduler_type", "constant", "--mask_ratio", "0.05", "--disable_tqdm", "True"),
    ]
    train(load_settings([*argv, *flags]))
    return folder / name


def found(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())["validation"]["train"]


@pytest.fixture(scope="module")
def best(folder: Path) -> Path:
    return run(folder, "best", *BEST)


def test_the_kept_step_is_the_lowest_of_the_curve_and_not_the_last(best: Path) -> None:
    got = found(best)
    losses = [entry["loss"] for entry in got["curve"]]
    assert [entry["step"] for entry in got["curve"]] == list(range(1, NUM_STEPS + 1))
    assert got["used_step"] == got["best_step"] == 1 + losses.index(min(losses)) < NUM_STEPS == got["last_step"]
    assert (got["metric"], got["rows"], got["stopped_early"]) == ("loss", 6, False)
    results = json.loads((best / "results.json").read_text())
    assert results["matrix"]["loss"]["after"][0][0] == pytest.approx(min(losses), abs=1e-6)
    assert any("judged on the rows that chose its best step" in note for note in results["notes"])


def test_its_weights_and_delta_are_those_of_a_run_that_ended_there(folder: Path, best: Path, tmp_path: Path) -> None:
    ended = run(folder, "ended", num_steps=found(best)["best_step"])
    assert same_bits(weights(best / TASK / "model"), weights(ended / TASK / "model"))
    deltas = [load_file(path / TASK / "delta.safetensors") for path in (best, ended)]
    assert deltas[0].keys() == deltas[1].keys()
    assert all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])
    delta = best / TASK / "delta.safetensors"
    main(["delta", "revert", str(best / TASK / "model"), str(delta), "--output", str(tmp_path / "base")])
    assert same_bits(weights(tmp_path / "base"), weights(folder / "model"))


class _SignalAt:
    """Sends this process SIGTERM at the end of a step, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        original, sent = StopAtStep.on_step_end, []

        def on_step_end(stop: StopAtStep, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == step and not sent:
                sent.append(os.kill(os.getpid(), signal.SIGTERM))
            return original(stop, args, state, control, **kwargs)

        monkeypatch.setattr(StopAtStep, "on_step_end", on_step_end)


def test_a_run_that_resumes_after_its_best_step_keeps_it(
    folder: Path, best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At another ZeRO stage, from the selected weights that the checkpoint holds; nothing of it is left afterwards."""
    stopped_at = found(best)["best_step"] + 1
    _SignalAt(monkeypatch, stopped_at)
    with pytest.raises(Preempted):
        run(folder, "resumed", *BEST)
    kept = folder / "resumed" / TASK / f"checkpoint-{stopped_at}" / "best.safetensors"
    assert kept.stat().st_size < 100_000
    resumed = run(folder, "resumed", *BEST, "--resume_from_checkpoint", "True", "--deepspeed", "zero3")
    assert found(resumed)["best_step"] == found(best)["best_step"]
    assert sha256_of(resumed / TASK / "model") == sha256_of(best / TASK / "model")
    assert not list((resumed / TASK).glob("checkpoint-*"))


def test_a_run_that_resumes_at_another_stage_goes_on_at_its_rate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its schedule is the trainer's: the first step after the checkpoint has the rate of that step already.

    What was evaluated chooses nothing here, and is told of the last step.
    """
    flags = ("--lr_scheduler_type", "linear", "--eval_strategy", "steps", "--eval_steps", "2", "--logging_steps", "1")
    whole = run(folder, "whole", *flags, num_steps=4)
    got = found(whole)
    assert [entry["step"] for entry in got["curve"]] == [2, 4]
    assert (got["used_step"], got["last_step"]) == (4, 4)
    _SignalAt(monkeypatch, 2)
    with pytest.raises(Preempted):
        run(folder, "moved", *flags, num_steps=4)
    moved = run(folder, "moved", *flags, "--resume_from_checkpoint", "True", "--deepspeed", "zero1", num_steps=4)
    assert found(moved) == got
    lines = [
        [json.loads(line) for line in (path / TASK / "metrics.jsonl").read_text().splitlines()]
        for path in (whole, moved)
    ]
    rates = [[row["learning_rate"] for row in rows if "learning_rate" in row] for rows in lines]
    assert rates[0] == rates[1] == sorted(rates[0], reverse=True)
    assert len(rates[0]) == 4
    assert sha256_of(moved / TASK / "model") == sha256_of(whole / TASK / "model")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [("--deepspeed", "zero3"), ("--deepspeed", "zero0", "--update_mode", "masked")], ids=["zero3", "masked"]
)
def test_other_stages_and_modes_keep_their_best_step(folder: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    other = run(folder, f"other-{flags[1]}", *BEST, *flags)
    step = found(other)["best_step"]
    assert step < NUM_STEPS
    ended = run(folder, f"other-{flags[1]}-ended", *flags, num_steps=step)
    got = weights(other / TASK / "model")
    assert same_bits(weights(ended / TASK / "model"), got)
    delta = other / TASK / "delta.safetensors"
    main(["delta", "apply", str(folder / "model"), str(delta), "--output", str(tmp_path / "applied")])
    assert same_bits(weights(tmp_path / "applied"), got)


@pytest.mark.slow
def test_early_stopping_ends_the_task_and_a_resumed_run_does_not_go_on(
    folder: Path, best: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = run(folder, "early", *BEST, "--early_stopping_patience", "2")
    got = found(early)
    assert (got["stopped_early"], got["last_step"]) == (True, got["best_step"] + 2)
    assert sha256_of(early / TASK / "model") == sha256_of(best / TASK / "model")
    _SignalAt(monkeypatch, got["last_step"])  # the checkpoint is of the very step at which patience runs out
    with pytest.raises(Preempted):
        run(folder, "early2", *BEST, "--early_stopping_patience", "2")
    again = run(folder, "early2", *BEST, "--early_stopping_patience", "2", "--resume_from_checkpoint", "True")
    assert found(again) == got
    assert sha256_of(again / TASK / "model") == sha256_of(best / TASK / "model")


@pytest.mark.slow
def test_score_and_loss_within_the_budget_choose_too(folder: Path) -> None:
    scored = found(run(folder, "scored", *BEST, "--metric_for_best_model", "score"))
    scores = [entry["score"] for entry in scored["curve"]]
    assert scored["used_step"] == 1 + scores.index(max(scores))
    budget = ("--forgetting_budget", "0.2", "--general_file", str(folder / "general.jsonl"))
    within = found(run(folder, "within", *BEST, "--metric_for_best_model", "loss_within_budget", *budget))
    fits = [entry for entry in within["curve"] if entry["general_rise"] <= 0.2]
    expected = min(fits, key=lambda e: e["loss"]) if fits else min(within["curve"], key=lambda e: e["general_rise"])
    assert within["used_step"] == expected["step"]


@pytest.mark.slow
def test_full_fine_tuning_keeps_its_best_step_in_a_checkpoint(folder: Path) -> None:
    full = ("--method", "seqft", "--learning_rate", "0.02")
    for config in ("zero2", "zero3"):
        flags = (*full, "--deepspeed", config, "--save_strategy", "best", "--save_total_limit", "1")
        kept = run(folder, f"full-{config}", *BEST, *flags)
        got = found(kept)
        assert got["used_step"] == got["best_step"] < got["last_step"]
        ended = run(folder, f"full-{config}-ended", *full, "--deepspeed", config, num_steps=got["best_step"])
        assert same_bits(weights(kept / TASK / "model"), weights(ended / TASK / "model"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compact", "masked"])
def test_transformers_own_best_checkpoint_works_with_the_callback(folder: Path, mode: str) -> None:
    """load_best_model_at_end of a plain Trainer: weights and delta of a Trainer that ended there."""
    rows, held_out = (_token_rows(seed, count) for seed, count in ((2, 16), (3, 4)))

    def fit(name: str, num_steps: int, **options: Any) -> tuple[Trainer, Path]:
        arguments = TrainingArguments(
            output_dir=str(folder / name),
            deepspeed={"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"},
            use_cpu=True,
            per_device_train_batch_size=4,
            max_steps=num_steps,
            learning_rate=0.4,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(make_model("llama"), arguments, default_data_collator, rows, held_out)
        callback = PieceCallback(trainer, method="piece-s", ratio=0.02, importance_batch_size=3, update_mode=mode)
        trainer.add_callback(callback)
        trainer.train()
        return trainer, folder / name / "delta.safetensors"

    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    kept, delta = fit(f"callback-{mode}", 6, **every, load_best_model_at_end=True)
    step = int(str(kept.state.best_model_checkpoint).split("-")[-1])
    assert step < 6
    ended, other = fit(f"callback-{mode}-ended", step, save_strategy="no")
    expected, got = whole_weights(ended.model_wrapped), whole_weights(kept.model_wrapped)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    first, second = load_file(delta), load_file(other)
    assert all(torch.equal(first[name], second[name]) for name in second)


def _token_rows(seed: int, count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(1, 97, (9,), generator=generator).tolist() for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in made]
