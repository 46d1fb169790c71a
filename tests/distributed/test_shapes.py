"""Models of every kind but the plain decoder: masks and steps are those of plain torch."""

from pathlib import Path

import pytest
from support.jobs import result_of, run_job
from support.shapes import RECURRENT
from support.shapes_job import CASES

FAST = (
    "falcon_h1-stage3-checkpointed",
    "recurrent_gemma-stage2",
    "shared-block-stage3",
    "added-rows-tied-stage3",
    "t5-stage0",
    "whisper-stage3",
    "tiled-mlp-stage2",
    "tiled-loss-stage2",
)


def check(folder: Path, num_ranks: int, names: tuple[str, ...]) -> None:
    results = run_job("support.shapes_job", num_ranks, folder, *names)
    for mode in ("masked", "compact"):  # an encoder-decoder in a Trainer
        case = result_of(results, f"trainer-{mode}")
        assert case["other"] <= 0.01 * case["k"]
        assert (case["moved"], case["trained"]) == (0, case["k"])
    for name in names:
        case = result_of(results, name)
        for mode in ("masked", "compact"):
            if name.startswith("tiled-loss"):
                assert "is formed in forward" in case[f"{mode} refused"]
                continue
            for which in ("sums", "squares"):
                error, of = case[f"{mode} {which}"]
                assert error < (2e-2 if "bf16" in name else 1e-5), (
                    f"{name}, {mode}: {which} of {of} are off by {error:.1e}"
                )
            # Of biases alone there are fewer than k.
            assert case[f"{mode} selected"] == case["k"] or "biases-alone" in name
            assert case[f"{mode} other"] <= (0.1 if "bf16" in name else 0.01) * case["k"], (
                f"{name}, {mode}: another mask"
            )
            assert case[f"{mode} moved"] == 0, f"{name}, {mode}: unselected weights moved"
            # bf16 gradients are rounded, and so are weights near 1, which may stay.
            assert case[f"{mode} trained"] == case[f"{mode} selected"] or "bf16" in name
            assert case[f"{mode} off"] < (0.5 if "bf16" in name else 1e-3), f"{name}, {mode}: weights are off"
            assert case[f"{mode} norm"] < (2e-2 if "bf16" in name else 1e-3), f"{name}, {mode}: norms are off"


def test_masks_and_steps_equal_plain_torch(tmp_path: Path) -> None:
    check(tmp_path, 2, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("kind", ["recurrent", "others"])
def test_all_masks_and_steps_equal_plain_torch(tmp_path: Path, kind: str, num_ranks: int) -> None:
    names = (name for name, (shape, *_) in CASES.items() if (shape in RECURRENT) == (kind == "recurrent"))
    check(tmp_path, num_ranks, tuple(names))
