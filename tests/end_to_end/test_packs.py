"""Best-fit packs on two ranks and on one, interrupted in the middle of an epoch: the same mask and the same weights."""

import re
from pathlib import Path

import pytest
import torch
from support.launches import changed, kill_when, launch, same_mask, succeeded, weights
from support.stream_runs import NUM_RANKS, Material

from piece_ds.runtime.schema import read_json

pytestmark = pytest.mark.slow


def test_packs_train_the_same_on_any_ranks_and_when_resumed(material: Material) -> None:
    def flags(name: str, num_ranks: int, **changes: object) -> list[str]:
        packs = {"packing": True, "pack_tokens": 24, "per_device_train_batch_size": 1, "importance_batch_size": 1}
        epochs = {"max_steps": None, "num_train_epochs": 2, "train_sampling_strategy": None}
        return material.short_flags(
            name, gradient_accumulation_steps=4 // num_ranks, save_steps=2, **packs, **epochs, **changes
        )

    whole = succeeded(launch("deepspeed", NUM_RANKS, "train.py", *flags("packs", NUM_RANKS)))
    found = re.search(r"32 rows in (\d+) packs of at most 24 tokens, (\d+)% full", whole.stderr)
    assert found is not None
    num_packs, full = map(int, found.groups())
    assert num_packs % 4 == 0
    assert num_packs < 32
    assert full > 60

    # Killed while its second checkpoint is written: the first lies in the middle of the first epoch.
    folder = material.out("packs-resumed")
    kill_when(folder / "00-train" / "checkpoint-4", flags("packs-resumed", 1), num_ranks=1)
    resumed = flags("packs-resumed", NUM_RANKS, resume_from_checkpoint=True)
    succeeded(launch("deepspeed", NUM_RANKS, "train.py", *resumed))
    assert _num_steps(folder) == _num_steps(material.out("packs")) == 2 * num_packs // 4

    # Importance is taken over rows, so that packs change nothing of it.
    succeeded(
        launch("deepspeed", NUM_RANKS, "train.py", *material.short_flags("rows", packing=True, importance_batch_size=1))
    )
    start = weights(material.base)
    for other in ("packs-resumed", "rows"):
        assert same_mask(material.out("packs") / "00-train", material.out(other) / "00-train")
    one, other = (weights(material.out(name) / "00-train" / "model") for name in ("packs", "packs-resumed"))
    assert changed(start, one)
    for name, values in one.items():
        torch.testing.assert_close(values, other[name], rtol=0, atol=1e-4)


def _num_steps(folder: Path) -> int:
    """Optimizer steps of a run's only task."""
    (cost,) = read_json(folder / "results.json", dict, "results", "run it")["cost"].values()
    return int(cost["num_steps"])
