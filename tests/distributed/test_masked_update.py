"""Masked training moves selected weights as plain AdamW does, and no bit of anything else, in every configuration."""

from typing import Any

import pytest
import torch
from support.errors_of_weights import largest_error, mean_error
from support.jobs import result_of
from support.undisturbed_cases import UNDISTURBED
from support.update_cases import (
    BF16_EXACT,
    CASES,
    DENSE,
    FP16,
    FP32,
    NUM_STEPS,
    OVERFLOW,
    WEIGHT_DECAY,
    factors,
    plain_dense_run,
    plain_run,
    selection,
)
from support.update_tiers import GATE, tiers, update_results
from torch import Tensor

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def result(job: Any, name: str) -> dict[str, Any]:
    return result_of(update_results(job, name), name)


def moved(before: dict[str, Tensor], after: dict[str, Tensor], selected: bool) -> int:
    """Elements inside or outside the selection whose bits differ."""
    count = 0
    for name, old in before.items():
        inside = torch.zeros(old.numel(), dtype=torch.bool)
        inside[selection().get(name, torch.zeros(0).long())] = True
        differs = old.view(BITS[old.dtype]) != after[name].view(BITS[old.dtype])
        count += int((differs & (inside if selected else ~inside)).sum())
    return count


def selected(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] for name in selection()}


def plain(name: str) -> tuple[dict[str, Tensor], list[float]]:
    case = CASES[name]
    return plain_run(case.setup.dtype, case.two_groups, case.scaled)


NUM_SELECTED = sum(index.numel() for index in selection().values())


@pytest.mark.parametrize("name", tiers(CASES))
def test_no_unselected_weight_moves(job: Any, name: str) -> None:
    got = result(job, name)
    assert moved(got["initial"], got["final"], selected=False) == 0


@pytest.mark.parametrize("name", tiers(CASES))
def test_no_unselected_master_moves(job: Any, name: str) -> None:
    """Low precision hides a drifting master for many steps."""
    got = result(job, name)
    assert all(master.dtype == torch.float32 for master in got["final_masters"].values())
    assert moved(got["initial_masters"], got["final_masters"], selected=False) == 0


@pytest.mark.parametrize("name", tiers(CASES))
def test_masters_begin_as_the_weights(job: Any, name: str) -> None:
    """With weight decay, DeepSpeed's stage 0 has already moved them in bf16 when it is built."""
    got = result(job, name)
    for parameter, master in got["initial_masters"].items():
        assert torch.equal(master, got["initial"][parameter].float())


@pytest.mark.parametrize("name", tiers(CASES))
def test_selected_weights_and_masters_train(job: Any, name: str) -> None:
    got = result(job, name)
    assert moved(got["initial"], got["final"], selected=True) > 0.9 * NUM_SELECTED
    assert moved(got["initial_masters"], got["final_masters"], selected=True) > 0.95 * NUM_SELECTED


@pytest.mark.parametrize("name", tiers(FP32))
def test_fp32_weights_equal_plain_adamw(job: Any, name: str) -> None:
    got, (want, _) = result(job, name), plain(name)
    assert largest_error(got["final"], selected(want), got["initial"]) < 1e-4


@pytest.mark.parametrize("name", tiers([*(n for n in CASES if n.startswith("bf16") and n not in BF16_EXACT), *FP16]))
def test_low_precision_weights_follow_plain_adamw(job: Any, name: str) -> None:
    """DeepSpeed accumulates and reduces in the model's dtype here."""
    got, (want, _) = result(job, name), plain(name)
    assert mean_error(got["final"], selected(want), got["initial"]) < 0.02


@pytest.mark.parametrize("name", tiers(BF16_EXACT))
def test_bf16_weights_equal_plain_adamw_where_deepspeed_accumulates_in_fp32(job: Any, name: str) -> None:
    """Equal, but for a sum whose rounding another order of ranks might tip."""
    got = result(job, name)
    want, _ = plain(name)
    differing = sum(int((want[n] != got["final"][n]).sum()) for n in selection())
    assert differing <= 0.01 * NUM_SELECTED


@pytest.mark.parametrize(
    "name", tiers(name for name, case in CASES.items() if case.setup.dtype == "fp32" or name in BF16_EXACT)
)
def test_reported_norm_is_that_of_the_masked_gradient(job: Any, name: str) -> None:
    """Before clipping; DeepSpeed itself reports none at stage 0 in fp32."""
    _, norms = plain(name)
    assert result(job, name)["norms"] == pytest.approx(norms, rel=1e-5)


@pytest.mark.parametrize("name", tiers([*(n for n in CASES if n.startswith("bf16") and n not in BF16_EXACT), *FP16]))
def test_reported_norm_is_masked_up_to_low_precision_reduction(job: Any, name: str) -> None:
    _, norms = plain(name)
    assert result(job, name)["norms"] == pytest.approx(norms, rel=0.02)


@pytest.mark.parametrize("name", tiers(CASES))
def test_optimizer_groups_keep_their_weight_decay(job: Any, name: str) -> None:
    want = {WEIGHT_DECAY, 0.0} if CASES[name].two_groups else {WEIGHT_DECAY}
    assert set(result(job, name)["decays"]) == want


@pytest.mark.parametrize("name", tiers(OVERFLOW))
def test_an_overflow_skips_the_step_and_moves_nothing(job: Any, name: str) -> None:
    got = result(job, name)
    assert 1 <= got["skipped_steps"] < NUM_STEPS
    assert all(torch.equal(got["initial"][n], got["after_first"][n]) for n in got["initial"])


@pytest.mark.parametrize("name", list(DENSE))
def test_scaled_steps_of_every_weight_equal_plain_ones(job: Any, name: str) -> None:
    """Without a mask, the decay of each group put back; in bf16 a sum's rounding may tip a weight."""
    got = result(job, f"dense-{name}")
    want, norms = plain_dense_run(DENSE[name].setup.dtype)
    assert got["decays"] == [WEIGHT_DECAY]
    if name != "stage0":
        assert got["norms"] == pytest.approx(norms, rel=1e-5)
    if name.startswith("bf16"):
        differing = sum(int((want[n] != got["final"][n]).sum()) for n in want)
        assert differing <= 0.01 * sum(values.numel() for values in want.values())
    else:
        update = max(float((want[n] - got["initial"][n]).abs().max()) for n in want)
        assert max(float((want[n] - got["final"][n]).abs().max()) for n in want) < 1e-4 * update


def test_scaled_steps_are_other_steps() -> None:
    """The cases above would prove nothing if the factors were near 1."""
    scaled, plain_ones = plain_run("fp32", False, True)[0], plain_run("fp32", False)[0]
    assert all(bool((scaled[n][index] != plain_ones[n][index]).any()) for n, index in selection().items())
    every = torch.cat([values for n, values in factors().items() if n in selection()])
    assert float(every.min()) < 0.1
    assert float(every.median()) == pytest.approx(0.74, abs=0.05)


def test_every_wrapper_of_deepspeed_was_met(job: Any) -> None:
    """The cases above would prove less if a configuration silently fell into another wrapper."""
    assert {result(job, name)["wrapper"] for name in CASES if name in GATE} == {
        "AdamW",
        "FP16_UnfusedOptimizer",
        "BF16_Optimizer",
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
    }


def test_clipping_was_active() -> None:
    _, norms = plain_run("fp32", False)
    assert min(norms) > 0.04  # twice the bound


def test_everything_trains_again_after_detach(job: Any) -> None:
    for setup, num_moved in result(job, "detach").items():
        assert num_moved > 1000, setup


@pytest.mark.parametrize("name", tiers(UNDISTURBED, "undisturbed-"))
def test_training_after_a_statistics_pass_equals_training_without(job: Any, name: str) -> None:
    """Three steps with dropout, the pass after the first: weights, masters and norms have the same bits."""
    got = result(job, f"undisturbed-{name}")
    assert got["with"]["norms"] == got["without"]["norms"]
    for which in ("weights", "masters"):
        for parameter, values in got["without"][which].items():
            bits = BITS[values.dtype]
            assert torch.equal(values.view(bits), got["with"][which][parameter].view(bits)), (which, parameter)


REASONS = {
    "sgd": "the optimizer SGD",
    "momentum": "the optimizer SGD",
    "rmsprop": "the optimizer RMSprop",
    "l2-decay": "Adam with L2 weight decay",
    "fp16-stage0": "fp16 at ZeRO stage 0",
    "zenflow": "zero_optimization.zenflow",
    "nvme": '"nvme"',
    "super-offload": "offload_optimizer.super_offload true",
    "ratio": "offload_optimizer.ratio 0.5",
    "quantized-gradients": "zero_quantized_gradients",
    "moe": "MoE",
    "predivided": "prescale_gradients true",
    "summed": 'gradient_allreduce_op "sum"',
    "masters": "bf16.bf16_master_weights_and_grads true",
    "expert-parallel": "expert_parallel.enabled true",
    "pipeline": "PipelineEngine: ranks hold other layers",
    "hybrid": "DeepSpeedHybridEngine: it takes the weights apart",
}


@pytest.mark.parametrize(("name", "reason"), REASONS.items())
def test_what_is_not_proven_is_refused_with_the_reason(job: Any, name: str, reason: str) -> None:
    got = result(job, f"refusal-{name}")
    assert got["type"] == "UserError"
    assert reason in got["message"]
    assert "\n" not in got["message"]
