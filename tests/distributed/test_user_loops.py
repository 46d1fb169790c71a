"""PIECE in a user's own Trainer or DeepSpeed loop, on two ranks."""

from typing import Any

import pytest
import torch
from support.jobs import result_of
from support.models import make_model
from torch import Tensor

from piece_ds.checkpoint import load_mask
from piece_ds.state.partition import layout_of

EVERY_LOOP = ["trainer-stage2", "trainer-stage3", *(f"loop-stage{stage}" for stage in range(4))]
TRAINERS = EVERY_LOOP[:2]


def result(job: Any, name: str) -> dict[str, Any]:
    return result_of(job("trainer_job", 2), name)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[tuple[str, int]]:
    """(name, flat index) of the weights whose bits differ."""
    return {
        (name, i)
        for name, values in first.items()
        for i in (values.view(torch.int32) != second[name].view(torch.int32)).nonzero().view(-1).tolist()
    }


@pytest.mark.parametrize("name", EVERY_LOOP)
def test_selected_weights_train_and_no_other(job: Any, name: str) -> None:
    got = result(job, name)
    selected = {(parameter, i) for parameter, index in got["index"].items() for i in index.tolist()}
    moved = differing(got["initial"], got["final"])
    assert moved <= selected
    assert len(moved) > 0.9 * len(selected) > 0


@pytest.mark.parametrize("name", TRAINERS)
def test_a_resumed_run_ends_with_the_same_bits(job: Any, name: str) -> None:
    """Weights, the mask, and every logged loss, norm and rate after the checkpoint."""
    got = result(job, name)
    assert differing(got["final"], got["resumed"]) == set()
    assert got["index"].keys() == got["resumed_index"].keys()
    assert all(torch.equal(index, got["resumed_index"][parameter]) for parameter, index in got["index"].items())
    keys = ("loss", "grad_norm", "learning_rate", "step")
    first, again = ([{key: entry[key] for key in keys} for entry in log] for log in (got["log"], got["resumed_log"]))
    assert first == again
    assert len(first) == 6


@pytest.mark.parametrize("name", TRAINERS)
def test_the_trainer_writes_its_mask(job: Any, name: str) -> None:
    got = result(job, name)
    mask = load_mask(got["mask_file"], layout_of(make_model("llama")))
    assert mask.method == "piece-s"
    assert all(torch.equal(mask.index[parameter], index) for parameter, index in got["index"].items())


def test_stages_train_the_same_weights_to_the_same_values(job: Any) -> None:
    first, other = result(job, "loop-stage0"), result(job, "loop-stage3")
    assert first["index"].keys() == other["index"].keys()
    for parameter, index in first["index"].items():
        torch.testing.assert_close(first["final"][parameter][index], other["final"][parameter][index],
                                   rtol=0, atol=1e-5)  # fmt: skip
