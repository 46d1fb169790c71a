"""Vision-language models through launch/train.py: what moves, what is written, and what bad images do."""

import json
from pathlib import Path

import pytest
import torch
from support.jobs import Results, result_of, run_job
from support.launches import (
    CONFIGS,
    SHARED,
    changed,
    launch,
    mask_index,
    same_bits,
    succeeded,
    write_rows,
)
from support.stream_runs import as_flags
from support.vision import TOWERS
from transformers import AutoModelForImageTextToText

from piece_ds.__main__ import main
from piece_ds.data.images import read_image
from piece_ds.demo.vision.models import make_processor, write_model
from piece_ds.demo.vision.tasks import BASE, TASKS, write_task

NUM_RANKS, NEW_TOKENS = 2, 4
# family, ZeRO configuration, update mode; the first two are quick enough for every day.
RUNS = {
    "llava-zero2": ("llava", "zero2.json", "masked"),
    "qwen3-vl-zero3": ("qwen3-vl", "zero3.json", "compact"),
    "llava-zero3": ("llava", "zero3.json", "masked"),
    "qwen3-vl-zero2": ("qwen3-vl", "zero2.json", "compact"),
}
DAILY = list(RUNS)[:2]
EVERY = [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in RUNS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and tasks; two rows of task `number` have no image, and answers are lists in a part of it."""
    folder = tmp_path_factory.mktemp("vision")
    for family in TOWERS:
        write_model(family, folder / family, seed=3)
    for name in TASKS:
        write_task({name: TASKS[name]}, folder / "tasks" / name, {"train": 16, "test": 5}, name)
    for split in ("train", "test"):
        path = folder / "tasks" / "number" / f"{split}.json"
        rows = json.loads(path.read_text())
        for row in rows[:2]:
            del row["image"]
        rows[2]["answer"] = [rows[2]["answer"]] * 2 + ["five"]
        rows[3]["pic_path"] = "/gone/elsewhere/" + rows[3].pop("image")
        write_rows(path, rows)
    return folder


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """Of the loaded model: some models' files have older names than their parameters."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return {name: param.detach() for name, param in model.named_parameters()}


def flags(root: Path, name: str, **changes: object) -> list[str]:
    family, config, mode = RUNS[name]
    values = {
        "deepspeed": CONFIGS / config,
        "model_name_or_path": root / family,
        "task_dir": root / "tasks",
        "tasks": "colour,number",
        "update_mode": mode,
        "mask_ratio": 0.05,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 2,
        "importance_batch_size": 2,
        "save_model": "each",
        "max_new_tokens": NEW_TOKENS,
        "per_device_eval_batch_size": 2,
        "dataloader_num_workers": 1,
        "general_file": root / "tasks" / "colour" / "train.json",
        "output_dir": root / "out" / name,
    }
    return as_flags({**values, **changes})


@pytest.fixture(scope="module")
def daily(root: Path) -> Results:
    return _run(root, DAILY)


@pytest.fixture(scope="module")
def others(root: Path) -> Results:
    return _run(root, [name for name in RUNS if name not in DAILY])


def _run(root: Path, names: list[str]) -> Results:
    job = root / "jobs" / names[0]
    job.mkdir(parents=True)
    (job / "runs.json").write_text(json.dumps({name: flags(root, name) for name in names}))
    return run_job("support.train_job", NUM_RANKS, job)


@pytest.fixture
def run(request: pytest.FixtureRequest, root: Path) -> tuple[str, Path]:
    """(name, output folder) of a run that succeeded."""
    name = request.param
    result_of(request.getfixturevalue("daily" if name in DAILY else "others"), name)
    return name, root / "out" / name


@pytest.mark.parametrize("run", EVERY, indirect=True)
def test_no_unselected_weight_moves_and_the_tower_stays(root: Path, run: tuple[str, Path]) -> None:
    name, out = run
    family = RUNS[name][0]
    before = parameters(root / family)
    for folder in ("00-colour", "01-number"):
        after, mask = parameters(out / folder / "model"), mask_index(out / folder / "mask.safetensors")
        moved = changed(before, after)
        assert moved
        assert not [parameter for parameter in (*moved, *mask) if parameter.startswith(TOWERS[family])]
        for parameter, positions in moved.items():
            assert set(positions.tolist()) <= set(mask[parameter].tolist())
        before = after


@pytest.mark.parametrize("run", EVERY, indirect=True)
def test_the_projector_is_selected_and_trains(root: Path, run: tuple[str, Path]) -> None:
    name, out = run
    moved = changed(parameters(root / RUNS[name][0]), parameters(out / "00-colour" / "model"))
    assert [parameter for parameter in moved if "projector" in parameter or "merger" in parameter]


@pytest.mark.parametrize("run", EVERY, indirect=True)
def test_texts_are_those_of_each_row_alone_in_plain_transformers(root: Path, run: tuple[str, Path]) -> None:
    """Two ranks, padded batches, rows with and without an image: after the last task, from the model it left."""
    name, out = run
    family, processor = RUNS[name][0], make_processor(RUNS[name][0])
    model = AutoModelForImageTextToText.from_pretrained(out / "01-number" / "model").eval()
    for task in TASKS:
        rows = json.loads((root / "tasks" / task / "test.json").read_text())
        lines = (out / "predictions" / "01-number" / f"{task}.jsonl").read_text().splitlines()
        written = [json.loads(line)["output"] for line in lines]
        assert len(written) == len(rows)
        for row, output in zip(rows, written, strict=True):
            path = row.get("image") or row.get("pic_path", "").removeprefix("/gone/elsewhere/")
            content = [{"type": "image"}] * bool(path) + [{"type": "text", "text": row["prompt"]}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            images = {"images": read_image(root / "tasks" / task / path, "")} if path else {}
            inputs = processor(text=text, **images, return_tensors="pt")
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            own = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert output == own, family


@pytest.mark.parametrize("run", EVERY, indirect=True)
def test_results_are_complete_and_the_saved_processor_loads(run: tuple[str, Path]) -> None:
    _, out = run
    results = json.loads((out / "results.json").read_text())
    assert results["matrix"]["metrics"] == ["accuracy", "accuracy"]
    assert None not in results["matrix"]["score"]["after"][1]
    assert results["matrix"]["general_loss"]["after"][1] > 0
    assert (out / "01-number" / "model" / "processor_config.json").is_file()


@pytest.mark.parametrize("run", EVERY, indirect=True)
def test_deltas_take_the_base_to_the_final_model(root: Path, run: tuple[str, Path]) -> None:
    """LLaVA's files have older names than its parameters."""
    name, out = run
    new = root / "applied" / name
    main(["delta", "apply", str(root / RUNS[name][0]), str(out), "--output", str(new)])
    assert same_bits(parameters(new), parameters(out / "01-number" / "model"))


@pytest.mark.slow
def test_the_embedded_base_questions_go_through_eval_and_select(root: Path) -> None:
    """eval_tasks.py and select_mask.py on the same rows; --eligible lets a tower's block be selected."""
    write_task(BASE, root / "tasks" / "base", {"train": 8, "test": 4}, "base")
    model = ["--deepspeed", CONFIGS / "zero3.json", "--model_name_or_path", root / "qwen3-vl"]
    mask, scores = root / "whole.safetensors", root / "scores.json"
    run = succeeded(
        launch(
            "deepspeed",
            2,
            "select_mask.py",
            *model,
            "--train_file",
            root / "tasks/base/train.json",
            "--mask_ratio",
            0.2,
            "--eligible",
            "*visual.blocks.*",
            "--output_file",
            mask,
        )
    )
    sizes = {name: tensor.numel() for name, tensor in parameters(root / "qwen3-vl").items() if "visual.blocks." in name}
    assert f"--eligible makes {sum(sizes.values())} parameters in {len(sizes)} tensors eligible" in run.stderr
    assert [name for name in mask_index(mask) if "visual.blocks." in name]
    assert not [name for name in mask_index(mask) if "patch_embed" in name or "pos_embed" in name]
    succeeded(
        launch(
            "deepspeed",
            2,
            "eval_tasks.py",
            *model,
            "--task_dir",
            root / "tasks",
            "--tasks",
            "base,number",
            "--max_new_tokens",
            2,
            "--output_file",
            scores,
        )
    )
    assert json.loads(scores.read_text())["measures"]["base"].keys() == {"exact_match"}


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "vqa").is_dir(), reason="no VQA questions: set PIECE_DS_SHARED to what holds vqa/")
def test_question_files_of_vqa_go_through_with_stand_in_images(root: Path, tmp_path: Path) -> None:
    """The files as they are; their images, which are not there, are drawn here, in subfolders as COCO's."""
    from random import Random

    from piece_ds.demo.vision.drawings import random_drawing

    tasks, images = ["action", "commonsense", "count"], tmp_path / "coco"
    for task in tasks:
        for split, limit in (("train", None), ("test", 4)):
            for row in json.loads((SHARED / "vqa" / task / f"{split}.json").read_text())[:limit]:
                path = images / row["pic_path"].split("_")[1] / row["pic_path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                random_drawing(Random(path.name)).draw(24).save(path)
    values = {
        "task_dir": SHARED / "vqa",
        "tasks": ",".join(tasks),
        "image_dir": images,
        "general_file": None,
        "max_eval_samples": 4,
        "importance_batch_size": 100,
        "save_model": "last",
        "output_dir": tmp_path / "out",
    }
    succeeded(launch("deepspeed", 2, "train.py", *flags(root, "qwen3-vl-zero3", **values)))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["finished"] == 3
    assert results["matrix"]["metrics"] == ["accuracy"] * 3
    assert None not in results["matrix"]["score"]["after"][2]
    scores = ["--task_dir", SHARED / "vqa", "--tasks", ",".join(tasks), "--image_dir", images, "--max_eval_samples", 4]
    succeeded(
        launch(
            "deepspeed",
            2,
            "eval_tasks.py",
            "--deepspeed",
            CONFIGS / "zero3.json",
            "--model_name_or_path",
            tmp_path / "out" / "02-count" / "model",
            *scores,
            "--output_file",
            tmp_path / "scores.json",
        )
    )
    assert json.loads((tmp_path / "scores.json").read_text())["score"].keys() == set(tasks)
