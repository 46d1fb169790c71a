"""PIECE in a user's own Trainer or DeepSpeed loop, on two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.jobs import result_of
from support.models import make_model
from support.trainer_job import NUM_STEPS, TRAINERS
from torch import Tensor

from piece_ds.checkpoint.mask_file import load_mask
from piece_ds.deltas import ChainFollower
from piece_ds.models.layout import layout_of

LOOPS = [*(f"loop-stage{stage}" for stage in range(4)), "loop-compact-stage1"]


def result(job: Any, name: str) -> dict[str, Any]:
    return result_of(job("trainer_job", 2), name)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[tuple[str, int]]:
    """(name, flat index) of the weights whose bits differ."""
    return {
        (name, i)
        for name, values in first.items()
        for i in (values.view(torch.int32) != second[name].view(torch.int32)).nonzero().view(-1).tolist()
    }


@pytest.mark.parametrize("name", [*TRAINERS, *LOOPS])
def test_selected_weights_train_and_no_other(job: Any, name: str) -> None:
    got = result(job, name)
    selected = {(parameter, i) for parameter, index in got["index"].items() for i in index.tolist()}
    moved = differing(got["initial"], got["final"])
    assert moved <= selected
    assert len(moved) > 0.9 * len(selected) > 0


@pytest.mark.parametrize("name", list(TRAINERS))
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


@pytest.mark.parametrize("name", [name for name, (_, options) in TRAINERS.items() if "delta_every" in options])
def test_a_copy_follows_the_trainers_chain_of_deltas(job: Any, name: str) -> None:
    """The resumed run continued it: its steps had their links, and its end has the same bits."""
    got, every = result(job, name), TRAINERS[name][1]["delta_every"]
    model = make_model("llama")
    links = ChainFollower(model, Path(got["mask_file"]).parent).apply_new()
    assert [link.step for link in links] == [*range(every, NUM_STEPS, every), NUM_STEPS]
    assert differing(got["final"], {n: p.detach().reshape(-1) for n, p in model.named_parameters()}) == set()


def test_the_trainers_delta_is_coded_as_asked(job: Any) -> None:
    for name, is_plain in (("trainer-stage2", True), ("trainer-compact-stage3", False)):
        with safe_open(Path(result(job, name)["mask_file"]).with_name("delta.safetensors"), "pt") as file:
            assert (file.metadata()["version"] == "1") == is_plain


@pytest.mark.parametrize("name", list(TRAINERS))
def test_the_trainer_writes_its_mask(job: Any, name: str) -> None:
    got = result(job, name)
    mask = load_mask(got["mask_file"], layout_of(make_model("llama")))
    options = TRAINERS[name][1]
    assert mask.method == ("piece-ratio" if "recipe" in options else options.get("method", "piece-s"))
    assert all(torch.equal(mask.index[parameter], index) for parameter, index in got["index"].items())


@pytest.mark.parametrize("name", list(TRAINERS))
def test_the_saved_model_is_the_trained_one_and_nothing_more(job: Any, name: str) -> None:
    got = result(job, name)
    saved = {parameter: values.view(-1) for parameter, values in load_file(got["model_file"]).items()}
    assert saved.keys() == got["final"].keys()
    assert differing(got["final"], saved) == set()


def test_compact_checkpoints_hold_the_model_only_if_asked(job: Any) -> None:
    files = {name: result(job, name)["checkpoint_bytes"] for name in TRAINERS}
    assert "model.safetensors" in files["trainer-compact-full-stage2"]
    assert "model.safetensors" not in files["trainer-compact-stage3"]
    states = {
        name: sum(size for path, size in found.items() if path.endswith("_states.pt")) for name, found in files.items()
    }
    assert states["trainer-compact-stage3"] < 0.2 * states["trainer-stage3"]


def test_compact_and_masked_loops_train_the_same_weights_to_the_same_values(job: Any) -> None:
    for first, other in (("trainer-stage3", "trainer-compact-stage3"), ("loop-stage1", "loop-compact-stage1")):
        one, two = result(job, first), result(job, other)
        for parameter, values in one["final"].items():
            torch.testing.assert_close(values, two["final"][parameter], rtol=0, atol=1e-6)


def test_stages_train_the_same_weights_to_the_same_values(job: Any) -> None:
    first, other = result(job, "loop-stage0"), result(job, "loop-stage3")
    assert first["index"].keys() == other["index"].keys()
    for parameter, index in first["index"].items():
        torch.testing.assert_close(
            first["final"][parameter][index], other["final"][parameter][index], rtol=0, atol=1e-5
        )
