"""An engine that has trained other weights takes no mask: their moments would go on moving them."""

from typing import Any

import pytest
from support.jobs import result_of, run_job

SETUPS = ("stage0", "stage2", "stage3-offload")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job("support.second_mask_job", 1, tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("first", ["none", "other"])
def test_moments_of_other_weights_are_refused(results: dict[str, Any], setup: str, first: str) -> None:
    refused = result_of(results, f"{setup} {first} detached")["refused"]
    assert refused.startswith("the engine's optimizer has moments of ")
    assert refused.endswith("Make a new engine of the model for every mask")


@pytest.mark.parametrize("setup", SETUPS)
def test_a_mask_that_holds_all_that_has_moments_is_exact(results: dict[str, Any], setup: str) -> None:
    assert result_of(results, f"{setup} smaller detached") == {"strays": 0}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("first", ["none", "other"])
def test_a_checkpoint_of_steps_without_the_mask_is_refused(results: dict[str, Any], setup: str, first: str) -> None:
    refused = result_of(results, f"{setup} {first} loaded")["refused"]
    assert refused.startswith("the checkpoint ")
    assert " has moments of " in refused


@pytest.mark.parametrize("setup", SETUPS)
def test_the_masks_own_checkpoint_is_loaded_after_attach(results: dict[str, Any], setup: str) -> None:
    assert result_of(results, f"{setup} same loaded") == {"strays": 0, "left": False}


@pytest.mark.parametrize("setup", [*SETUPS, "compact"])
def test_two_masks_at_once_are_refused(results: dict[str, Any], setup: str) -> None:
    assert "attached to this engine already" in result_of(results, f"{setup} other attached")["refused"]


def test_an_engine_that_has_left_compact_mode_is_refused(results: dict[str, Any]) -> None:
    assert "cannot train any more" in result_of(results, "compact other detached")["refused"]
