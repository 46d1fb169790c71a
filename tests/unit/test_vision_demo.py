"""The drawn example's command: what the base and the tasks of each family are trained with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from support.fakes import faked

from piece_ds.cli import vision_demo as module
from piece_ds.config.settings import Settings, parse
from piece_ds.demo.vision.models import FAMILIES
from piece_ds.runtime.errors import UserError

RANKS = 4
FIXED = {
    "per_device_train_batch_size": "8",  # 32 rows of a step
    "per_device_eval_batch_size": "64",
    "max_new_tokens": "8",
    "lr_scheduler_type": "linear",
    "warmup_steps": "20",
    "adam_beta2": "0.95",
}


def said(settings: Settings, names: Any) -> dict[str, str]:
    """Flag -> its value, as text: ours as parsed, TrainingArguments' as given."""
    parts = settings._ours()
    return {
        name: str(next((getattr(part, name) for part in parts if hasattr(part, name)), settings.flag(name)))
        for name in names
    }


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    fakes = faked(monkeypatch, module, "train", "world_size")
    fakes.world_size.return_value = RANKS
    return fakes


def test_the_base_learns_its_questions_with_every_weight_and_the_tower(tmp_path: Path, fakes: mock.Mock) -> None:
    module._train_base(parse(["--seed", "9"]), tmp_path, "llava")
    ((settings,), _) = fakes.train.call_args
    expected = {
        **FIXED,
        "seed": "9",
        "model_name_or_path": str(tmp_path / "llava" / "untrained"),
        "train_file": str(tmp_path / "base" / "train.json"),
        "eval_file": str(tmp_path / "base" / "test.json"),
        "method": "seqft",
        "eligible": "*vis*",
        "max_steps": "700",
        "learning_rate": "0.002",
        "output_dir": str(tmp_path / "llava" / "base"),
    }
    assert said(settings, expected) == expected


def test_the_tasks_start_from_the_base_and_select_a_tenth(tmp_path: Path, fakes: mock.Mock) -> None:
    found = module._train_tasks(parse(["--seed", "9"]), tmp_path, "qwen3-vl", tmp_path / "out")
    assert found is fakes.train.return_value
    ((settings,), _) = fakes.train.call_args
    expected = {
        **FIXED,
        "seed": "9",
        "model_name_or_path": str(tmp_path / "qwen3-vl" / "base" / "00-train" / "model"),
        "task_dir": str(tmp_path / "tasks"),
        "tasks": "colour,number",
        "general_file": str(tmp_path / "base" / "test.json"),
        "mask_ratio": "0.1",
        "importance_batch_size": "16",
        "max_steps": "150",
        "learning_rate": "0.001",
        "output_dir": str(tmp_path / "out"),
    }
    assert said(settings, expected) == expected


@pytest.mark.parametrize(
    "of_method",
    [
        {"method": "lora", "lora_r": "4", "learning_rate": "0.25"},
        {"method": "piece-f", "mask_ratio": "0.5", "general_kl": "2.0"},
        {"recipe": "mask"},
    ],
)
def test_the_users_method_is_for_the_tasks_and_never_for_the_base(
    of_method: dict[str, str], tmp_path: Path, fakes: mock.Mock
) -> None:
    flags = {**of_method, "eligible": "*proj*", "max_steps": "3", "output_dir": "elsewhere"}
    settings = parse([word for name, value in flags.items() for word in (f"--{name}", value)])
    module._train_base(settings, tmp_path, "llava")
    module._train_tasks(settings, tmp_path, "llava", tmp_path / "out")
    base, tasks = (call.args[0] for call in fakes.train.mock_calls)
    plain = {"method": "seqft", "eligible": "*vis*", "max_steps": "3", "learning_rate": "0.002", "recipe": "None"}
    plain |= {"output_dir": str(tmp_path / "llava" / "base"), "general_kl": "0.0", "lora_r": "8", "step_scale": "none"}
    assert said(base, plain) == plain | said(parse([]), ["lora_r"])
    assert said(tasks, flags) == {**flags, "output_dir": str(tmp_path / "out")}


def test_more_ranks_than_rows_of_a_step_have_one_row_each(tmp_path: Path, fakes: mock.Mock) -> None:
    fakes.world_size.return_value = 2 * module.BATCH_SIZE
    module._train_base(parse([]), tmp_path, "llava")
    assert said(fakes.train.call_args.args[0], ["per_device_train_batch_size"]) == {"per_device_train_batch_size": "1"}


def test_the_material_is_written_once_for_both_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = faked(monkeypatch, module, "write_model", "write_task", "words")
    module.write_material(tmp_path, 7)
    assert fakes.write_model.mock_calls == [
        mock.call(family, tmp_path / family / "untrained", 7, fakes.words.return_value) for family in FAMILIES
    ]
    assert fakes.write_task.mock_calls == [
        mock.call(module.BASE, tmp_path / "base", {"train": 4096, "test": 128}, "7/base"),
        *(
            mock.call({name: question}, tmp_path / "tasks" / name, {"train": 1024, "test": 128}, f"7/{name}")
            for name, question in module.TASKS.items()
        ),
    ]


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_every_family_gets_its_base_its_tasks_and_its_report(
    named: bool, main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("start_distributed", "is_main", "barrier", "write_material", "_train_base", "_train_tasks")
    fakes = faked(monkeypatch, module, *names, "print_results", "write_report")
    require_free = mock.create_autospec(module.RunFolder.require_free)
    monkeypatch.setattr(module.RunFolder, "require_free", require_free)
    fakes.is_main.return_value = main
    fakes._train_tasks.side_effect = lambda settings, material, family, output: (family, SimpleNamespace(root=output))
    fakes.write_report.side_effect = lambda root, runs: root / "report.html"
    root = tmp_path if named else Path("runs/vqa")
    module.main([*(["--output_dir", str(tmp_path)] if named else []), "--seed", "7", "--ddp_timeout", "77"])
    settings, material = fakes._train_base.call_args.args[0], root / "material"
    assert (settings.flag("seed"), settings.flag("ddp_timeout")) == ("7", "77")
    fakes.start_distributed.assert_called_once_with(module.timeout_seconds("77"))
    require_free.assert_called_once_with(module.RunFolder(root), resume=False)
    assert fakes.write_material.mock_calls == [mock.call(material, 7)] * main
    fakes.barrier.assert_called_once_with()
    trained = [call for call in fakes.mock_calls if call[0].startswith("_train")]
    assert trained == [
        step
        for family in FAMILIES
        for step in (
            mock.call._train_base(settings, material, family),
            mock.call._train_tasks(settings, material, family, root / family),
        )
    ]
    assert fakes.print_results.mock_calls == [mock.call([family]) for family in FAMILIES if main]
    shown = "".join(f"== {family}\nreport: {root / family / 'report.html'}\n" for family in FAMILIES if main)
    assert capsys.readouterr().out == shown

    # No rank trains on what is not written, and nothing is written where a run is.
    order = [call[0] for call in fakes.mock_calls if call[0] in ("start_distributed", "write_material", "barrier")]
    assert order == ["start_distributed", *(["write_material"] if main else []), "barrier"]


def test_a_folder_with_a_run_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes = faked(monkeypatch, module, "start_distributed", "write_material", "_train_base")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="run"):
        module.main(["--output_dir", str(tmp_path)])
    assert [call[0] for call in fakes.mock_calls] == ["start_distributed"]
