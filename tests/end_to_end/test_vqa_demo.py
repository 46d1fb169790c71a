"""The drawn example learns: what `make vqa-demo` runs, on one rank."""

import json
from pathlib import Path

import pytest
from support.launches import CONFIGS, launch, succeeded

from piece_ds.demo.vision.models import FAMILIES

CHANCE = 0.25


@pytest.mark.slow
def test_both_models_learn_both_tasks_well_above_chance(tmp_path: Path) -> None:
    """On drawings that were not trained on, right after each task; and the base could answer none of the questions."""
    run = launch("python", 1, "vqa_demo.py", "--deepspeed", CONFIGS / "zero2.json", "--output_dir", tmp_path / "out")
    succeeded(run)
    for family in FAMILIES:
        assert f"== {family}" in run.stdout
        check_learned(tmp_path / "out" / family)


def check_learned(folder: Path) -> None:
    matrix = json.loads((folder / "results.json").read_text())["matrix"]["score"]
    assert max(matrix["before"]) <= CHANCE
    assert min(matrix["after"][0][0], matrix["after"][1][1]) >= 0.6
