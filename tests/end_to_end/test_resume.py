"""A run that is killed, twice, and goes on: the same bits as one that was not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.jobs import Results, result_of
from support.launches import (
    kill_when,
    launch,
    mask_index,
    same_bits,
    succeeded,
    tree,
    weights,
)
from support.stream_runs import NUM_RANKS, Material, long_flags
from transformers import AutoModelForCausalLM

from piece_ds.deltas import ChainFollower

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def killed_twice(material: Material) -> tuple[Path, dict[str, int]]:
    """The folder of a run killed in the first task's statistics and in the second task's training, then finished.

    And when its first task's files were last written, before and after the last launch.
    """
    folder = material.out("killed")
    flags = long_flags(material, "killed", save_steps=2)
    kill_when(folder / "results.json", flags, NUM_RANKS)  # written when the pass over the data begins
    assert not (folder / "00-letter" / "mask.safetensors").exists()
    flags += ["--resume_from_checkpoint", "True"]
    kill_when(folder / "01-text" / "checkpoint-4" / "trainer_state.json", flags, NUM_RANKS)
    assert not (folder / "01-text" / "delta.safetensors").exists()
    first = {
        name: (folder / "00-letter" / name).stat().st_mtime_ns for name in ("mask.safetensors", "delta.safetensors")
    }
    run = succeeded(launch("deepspeed", NUM_RANKS, "train.py", *flags))
    assert "task 2 of 2" in run.stderr
    assert "task 1 of 2" not in run.stderr
    return folder, first


def test_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    material: Material, slow_variants: Results, killed_twice: tuple[Path, dict[str, int]]
) -> None:
    result_of(slow_variants, "long")
    expected, found = material.out("long"), killed_twice[0]
    assert same_bits(weights(expected / "01-text" / "model"), weights(found / "01-text" / "model"))
    for task in ("00-letter", "01-text"):
        masks = [mask_index(root / task / "mask.safetensors") for root in (expected, found)]
        assert masks[0].keys() == masks[1].keys()
        assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
        first, second = (load_file(root / task / "delta.safetensors") for root in (expected, found))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_copy_follows_the_chain_of_deltas_of_a_killed_run(
    material: Material, killed_twice: tuple[Path, dict[str, int]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(material.base)
    steps = [link.step for link in ChainFollower(model, killed_twice[0]).apply_new()]
    assert steps == [5, 10, 12, 5, 10, 12]
    trained = AutoModelForCausalLM.from_pretrained(killed_twice[0] / "01-text" / "model")
    assert same_bits(dict(model.named_parameters()), dict(trained.named_parameters()))


def test_finished_task_is_not_done_again(killed_twice: tuple[Path, dict[str, int]]) -> None:
    folder, times = killed_twice
    assert {name: (folder / "00-letter" / name).stat().st_mtime_ns for name in times} == times


def test_no_checkpoint_or_temporary_file_is_left(
    material: Material, slow_variants: Results, killed_twice: tuple[Path, dict[str, int]]
) -> None:
    result_of(slow_variants, "long")
    assert tree(killed_twice[0]) == tree(material.out("long"))
