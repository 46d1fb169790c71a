"""The commands that start runs, the settings they print, and the call that does the same from Python."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

import piece_ds
from piece_ds.__main__ import main
from piece_ds.cli.commands import LAUNCHED, launched_command, run_launched
from piece_ds.cli.main import _parser
from piece_ds.cli.notebook import _as_flag, _task_flags
from piece_ds.config.deepspeed_configs import FOLDER, config_names, config_path, with_config_paths
from piece_ds.config.settings import parse
from piece_ds.config.yaml_settings import settings_yaml
from piece_ds.plan.setting import Setting
from piece_ds.runtime.errors import UserError


def test_a_launchers_rank_before_the_command_is_no_command() -> None:
    assert launched_command(["--local_rank=1", "train", "--seed", "3"]) == "train"
    assert launched_command(["select"]) == "select"
    assert launched_command(["delta", "list", "train"]) is None
    assert launched_command([]) is None


def test_version_and_help_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--help"]):
        with pytest.raises(SystemExit) as leaving:
            main(words)
        assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert piece_ds.__version__ in shown
    assert all(command in shown for command in LAUNCHED)


def test_flags_that_are_left_out_have_the_values_that_are_documented() -> None:
    """A plan's are those of Setting, which are training's."""
    coding = {"coding": "indices"}
    wanted: dict[str, dict[str, object]] = {
        "delta merge MODEL D --output O": {"how": "replace", "density": 1.0, "scale": 1.0, "seed": 42, **coding},
        "delta scale D --alpha 0.5 --output O": coding,
        "delta prune D --keep 0.5 --output O": {"by": "change", "rows": 256, "batch_size": 8, **coding},
        "delta diff A B --output O": coding,
        "delta compose D --output O": coding,
        "plan --model M": asdict(Setting()),
        "doctor": {"folder": ".", "ranks": 2},
        "report R": {"output": "comparison.html"},
    }
    for words, defaults in wanted.items():
        found = vars(_parser().parse_args(words.split()))
        assert {name: found[name] for name in defaults} == defaults, words


def test_a_shell_completes_every_command_and_flag(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit) as leaving:
            main(["--completion", shell])
        assert leaving.value.code == 0
        script = capsys.readouterr().out
        for word in ("train", "delta", "merge", "--loss_chunk_tokens", "--learning_rate", "--print_config", "compact"):
            assert word in script, (shell, word)
        (tmp_path / shell).write_text(script)
    # What bash makes of it: a prefix of a flag has one end.
    asked = f"source {tmp_path / 'bash'}; COMP_WORDS=(piece_ds train --early_stopping_p); COMP_CWORD=2; "
    shown = subprocess.run(
        ["bash", "-c", f"{asked} _shtab_piece_ds; echo ${{COMPREPLY[@]}}"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == ["--early_stopping_patience"]


def test_configurations_travel_with_the_package_and_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_offload_all"} == set(
        config_names()
    )
    assert config_path("zero3") == config_path("zero3.json") == str(FOLDER / "zero3.json")
    assert Path(piece_ds.__file__).parent in FOLDER.parents
    for other in ("zero9", "ds_configs/zero3.json", "{}", str(FOLDER / "zero1.json")):
        assert config_path(other) == other
    (tmp_path / "zero3").write_text("{}")  # a file of the user's wins
    assert config_path("zero3") == "zero3"
    assert with_config_paths(["--seed", "zero2", "--deepspeed", "zero2", "--deepspeed=zero1", "--deepspeed"]) == [
        *("--seed", "zero2", "--deepspeed", str(FOLDER / "zero2.json")),
        *(f"--deepspeed={FOLDER / 'zero1.json'}", "--deepspeed"),
    ]


def test_printed_settings_read_back_as_they_were(tmp_path: Path) -> None:
    flags = "--output_dir out --mask_ratio 0.01 --columns prompt=a,answer=b --learning_rate 3e-4 --report_to none"
    kwargs = ["--lr_scheduler_kwargs", '{"power": 2.0}', "--chat_template", "--deepspeed", "zero1", "--use_cpu", "True"]
    settings = parse([*flags.split(), *kwargs])
    text = settings_yaml(settings)
    assert yaml.safe_load(text)["mask_ratio"] == 0.01
    assert "mask (1 % of the weights)" in text
    assert "%%" not in text
    (tmp_path / "run.yaml").write_text(text)
    again = parse(["--config", str(tmp_path / "run.yaml")])
    assert again.resolved() == settings.resolved()
    assert yaml.safe_load(settings_yaml(again)) == yaml.safe_load(text)
    names = [name for name in yaml.safe_load(text) if name in TrainingArguments.__dataclass_fields__]
    assert len(names) > 90


def test_settings_of_a_call_become_the_commands_flags() -> None:
    assert _as_flag("tasks", ["a", "b"]) == ["--tasks", "a,b"]
    assert _as_flag("lr_scheduler_kwargs", {"power": 2}) == ["--lr_scheduler_kwargs", '{"power": 2}']
    assert _as_flag("bf16", True) == ["--bf16", "True"]
    assert _as_flag("eval_file", None) == []


def test_tasks_of_a_call_may_be_files_names_or_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "é", "answer": "b"}]
    given = tmp_path / "mine.json"
    given.write_text(json.dumps(rows))
    assert _task_flags(given, tmp_path / "out") == {"train_file": str(given)}
    assert _task_flags(["a", "b"], tmp_path / "out") == {"tasks": "a,b"}
    for _ in range(2):  # a second call, as after an interruption, finds its own files
        flags = _task_flags({"x": rows, "y": {"train": given, "test": rows}}, tmp_path / "out")
    assert flags == {"task_dir": str(tmp_path / "out-tasks"), "tasks": "x,y"}
    assert sorted(
        str(path.relative_to(tmp_path / "out-tasks")) for path in (tmp_path / "out-tasks").rglob("*.json*")
    ) == [
        "x/train.jsonl",
        "y/test.jsonl",
        "y/train.json",
    ]
    assert json.loads((tmp_path / "out-tasks/y/train.json").read_text()) == rows
    with pytest.raises(UserError, match=r"task 'x' has \['test'\]"):
        _task_flags({"x": {"test": rows}}, tmp_path / "out")
    with pytest.raises(UserError, match=r"model is a dict, expected a folder or a Hub id"):
        piece_ds.train({}, given, tmp_path / "out")


def test_print_config_prints_the_settings_of_the_other_flags_and_starts_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("piece_ds.runtime.process.run_command", lambda main, argv: main(argv))
    run_launched("train", ["--seed", "7", "train", "--print_config", "--output_dir", "train"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["output_dir"]) == (7, "train")


@pytest.mark.slow
def test_print_config_prints_nothing_but_yaml(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "piece_ds", "--local_rank=0", "train", "--print_config", "--seed", "7"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["seed"] == 7


def test_a_flag_that_a_command_lacks_is_named_as_it_was_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["delta", "list", "d", "--model_name_or_path", "m"])
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --model_name_or_path m (piece_ds --help)\n"
