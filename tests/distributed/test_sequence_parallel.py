"""Ulysses sequence parallelism: masks, losses and steps are those of whole rows on one rank, or it is refused."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Results, result_of, run_job
from support.sequence_job import CASES, REFUSALS

MESSAGES = {
    "left padding": "rows must be padded on the right",
    "labels on padding": "tokens of padding may have no label",
    "packed rows": "not proven with packed rows",
    "images": "pixel_values: other inputs cannot be cut",
    "more rows": "a micro-batch of 4 rows, and sequence parallelism was set up for 2",
    "window": "the model attends to windows of 8",
    "attention of its own": "GPTJForCausalLM has layers that do not take part in Ulysses' exchange",
    "recurrence": "MambaForCausalLM has layers that do not take part",
    "bf16 optimizer": "DeepSpeed's BF16_Optimizer (bf16 at ZeRO-1",
    "bf16 at stage 0": "DeepSpeed's FP16_UnfusedOptimizer (16 bits at ZeRO-0)",
    "all-reduce": "reduce_scatter false",
}


FAST = ("llama-stage0", "qwen3-stage2", "llama-stage3", "llama-bf16-stage3")


def check(results: Results, names: Iterable[str] = CASES) -> None:
    for name in names:
        case, fp32 = result_of(results, name), CASES[name][1].dtype == "fp32"
        for mode in ("masked", "compact"):

            def of(key: str, mode: str = mode, case: dict[str, Any] = case) -> Any:
                return case[f"{mode} {key}"]

            # bf16 gradients are rounded on each rank before they are added.
            assert max(of("sums"), of("squares")) < (1e-5 if fp32 else 5e-2), name
            assert of("selected") == case["k"]
            assert of("other") <= (0.01 if fp32 else 0.1) * case["k"], name
            assert of("loss") < (1e-5 if fp32 else 2e-2), name
            assert of("moved") == 0, name
            # Adam's first steps have one size: a gradient near zero, rounded, may step the other way.
            assert of("off") < 1e-3 if fp32 else of("far") <= 0.002, name
            assert of("norm") < (1e-4 if fp32 else 2e-2), name
    for name in REFUSALS:
        message = result_of(results, f"refusal-{name}")["message"]
        assert MESSAGES[name] in message, f"{name}: {message!r}"
        assert "\n" not in message


def test_two_ranks_that_share_rows_do_what_one_does(tmp_path: Path) -> None:
    check(run_job("support.sequence_job", 2, tmp_path, "2", *FAST), FAST)


@pytest.mark.slow
def test_at_every_stage(tmp_path: Path) -> None:
    check(run_job("support.sequence_job", 2, tmp_path, "2"))


@pytest.mark.slow
def test_four_ranks_that_share_rows_by_twos_do_what_one_does(tmp_path: Path) -> None:
    check(run_job("support.sequence_job", 4, tmp_path, "2"))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compact", "masked"])
def test_a_trainer_whose_ranks_share_rows_does_what_one_rank_does_at_zero_3(tmp_path: Path, mode: str) -> None:
    case = result_of(run_job("support.sequence_trainer_job", 2, tmp_path, mode), mode)
    assert case["other"] <= 0.01 * case["selected"]
    assert case["moved"] == 0
    assert case["off"] < 1e-3
    assert case["norm"] < 1e-3


@pytest.mark.slow
def test_a_trainer_whose_ranks_share_rows_is_refused_below_zero_3(tmp_path: Path) -> None:
    case = result_of(run_job("support.sequence_trainer_job", 2, tmp_path, "stage2"), "stage2")
    assert "below ZeRO-3" in case["message"]
    assert not case["written"]
