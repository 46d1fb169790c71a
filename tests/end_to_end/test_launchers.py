"""The same job under another launcher, alone, and with its flags in a YAML file."""

import json
from pathlib import Path

import pytest
import yaml
from support.launches import changed, launch, mask_index, same_bits, succeeded, weights
from support.stream_runs import ACCUMULATION, BATCH_SIZE, NUM_RANKS, TRAINING, Material

pytestmark = pytest.mark.slow


def test_torchrun_and_a_yaml_file_give_what_deepspeed_and_flags_give(material: Material, stream: Path) -> None:
    """The file also holds a rate that a flag overrides."""
    config = material.root / "run.yaml"
    config.write_text(yaml.safe_dump({**TRAINING, "learning_rate": 5.0, "tasks": "letter,text"}))
    flags = material.stream_flags(
        "yaml", **dict.fromkeys(TRAINING), tasks=None, general_file=material.root / "general.jsonl"
    )
    flags += ["--config", str(config), "--learning_rate", str(TRAINING["learning_rate"])]
    succeeded(launch("torchrun", NUM_RANKS, "train.py", *flags))
    found = material.out("yaml")
    for folder in ("00-letter", "01-text"):
        assert same_bits(weights(stream / folder / "model"), weights(found / folder / "model"))
    matrices = [json.loads((root / "results.json").read_text())["matrix"] for root in (stream, found)]
    assert matrices[0] == matrices[1]


def test_one_process_without_launcher_gives_what_two_ranks_give(material: Material, stream: Path) -> None:
    """With the same rows in each step; sums over ranks round apart, so weights agree to 5 % of the largest update."""
    flags = material.stream_flags(
        "alone",
        tasks="letter",
        gradient_accumulation_steps=NUM_RANKS * ACCUMULATION,
        per_device_train_batch_size=BATCH_SIZE,
    )
    succeeded(launch("python", 1, "train.py", *flags))
    expected, found = stream / "00-letter", material.out("alone") / "00-letter"
    masks = [
        {(n, p) for n, positions in mask_index(f / "mask.safetensors").items() for p in positions.tolist()}
        for f in (expected, found)
    ]
    assert len(masks[0] - masks[1]) <= 0.01 * len(masks[0])
    base, first, second = weights(material.base), weights(expected / "model"), weights(found / "model")
    largest = max(float((first[name] - base[name]).abs().max()) for name in base)
    assert changed(base, second)
    apart = [abs(float(first[n].view(-1)[p] - second[n].view(-1)[p])) for n, p in masks[0] & masks[1]]
    assert max(apart) <= 0.05 * largest


def test_mask_and_scores_can_be_had_alone(material: Material, stream: Path) -> None:
    """select_mask.py writes the mask that training used; eval_tasks.py the losses that training recorded."""
    mask, scores = material.root / "alone.safetensors", material.root / "scores.json"
    shared = ["--deepspeed", "ds_configs/zero3.json", "--model_name_or_path", material.base]
    train = material.tasks / "letter" / "train.json"
    succeeded(
        launch(
            "deepspeed",
            2,
            "select_mask.py",
            *shared,
            "--train_file",
            train,
            "--method",
            "piece-s",
            "--mask_ratio",
            TRAINING["mask_ratio"],
            "--importance_batch_size",
            4,
            "--output_file",
            mask,
        )
    )
    used = mask_index(stream / "00-letter" / "mask.safetensors")
    found = mask_index(mask)
    assert {n: i.tolist() for n, i in found.items()} == {n: i.tolist() for n, i in used.items()}
    succeeded(
        launch(
            "deepspeed",
            2,
            "eval_tasks.py",
            *shared,
            "--task_dir",
            material.tasks,
            "--tasks",
            "letter,text",
            "--output_file",
            scores,
        )
    )
    before = json.loads((stream / "results.json").read_text())["matrix"]["loss"]["before"]
    assert list(json.loads(scores.read_text())["loss"].values()) == pytest.approx(before, rel=1e-5)
