"""The stream of the study: settings of the grid, flags of one run of three tasks, a table of what is left."""

import argparse
from pathlib import Path

from bench.continual.real import stream
from bench.continual.real.grid import SWEEPS, Setting
from bench.continual.real.recipe import Recipe
from bench.continual.real.run import flags_of, results_folder
from piece_ds.evaluation.matrix import Measure
from piece_ds.methods.peft_config import read_peft_config

ACCURACY = Measure(after=((0.5, 0.0, 0.0), (0.25, 0.75, 0.0), (0.25, 0.5, 1.0)), before=(0.0, 0.0, 0.0))


def test_every_setting_is_of_the_grid_or_of_streams_and_the_first_seed_comes_first() -> None:
    settings = stream.settings_in_order((1, 2))
    assert {setting.sweep for setting in settings} <= {*SWEEPS, *stream.OF_STREAMS}
    assert len({setting.key for setting in settings}) == len(settings)
    half = len(settings) // 2
    assert [setting.seed for setting in settings] == [1] * half + [2] * half


def test_a_measure_gives_each_task_right_after_its_training_and_at_the_end() -> None:
    found = stream.of_measure("score", ACCURACY)
    first, second, third = stream.TASKS
    assert (found[f"score {first} learned"], found[f"score {first} at the end"]) == (0.5, 0.25)
    assert (found[f"score {second} learned"], found[f"score {second} at the end"]) == (0.75, 0.5)
    assert (found[f"score {third} before"], found[f"score {third} at the end"]) == (0.0, 1.0)
    assert found["score learning"] == 0.75
    assert found["score backward transfer"] == -0.25  # both earlier tasks lost a quarter


def test_the_page_has_a_row_for_each_run_and_counts_those_that_are_missing() -> None:
    loss = Measure(after=ACCURACY.after, before=ACCURACY.before, higher_is_better=False)
    figures = {**stream.of_measure("score", ACCURACY), **stream.of_measure("loss", loss)}
    figures |= {f"{name} after {task}": 0.001 * task for name in ("rise", "kl") for task in (1, 2, 3)}
    run = {"name": "full", "task": "+".join(stream.TASKS), "rate": "0.0001", "seed": "1", "delta_bytes": "2000000"}
    page = stream.stream_page([{**run, **{name: f"{value:.6g}" for name, value in figures.items()}}])
    assert "| full | 0.0001 | 1 | 0.750 | 0.583 | -0.250 | 75.0% | 58.3% | -25.0 | +0.003 | 0.003 | 2.0 |" in page
    assert f"1 of the {len(stream.settings_in_order())} planned runs" in page


def test_flags_of_the_stream_name_all_tasks_and_keep_no_statistics_of_a_task(tmp_path: Path) -> None:
    options = argparse.Namespace(cache=tmp_path)
    setting = next(s for s in stream.settings_in_order() if s.sweep.name == "PIECE-S 0.1 %")
    flags = stream.flags_of_stream(setting, stream.Recipe(), options, tmp_path / "model", tmp_path, tmp_path / "out")
    values = dict(zip(flags[::2], flags[1::2], strict=True))  # the last of a flag wins, as in the parser
    assert values["--tasks"] == ",".join(stream.TASKS)
    assert values["--save_model"] == "each"
    assert "--statistics_file" not in flags
    assert "--scorers" not in flags


def test_each_model_has_a_folder_of_results_of_its_own() -> None:
    assert len({results_folder(name) for name in ("smollm2-135m", "gemma3-270m", "other")}) == 3


def test_a_sweep_states_its_unit_its_adapter_and_its_penalty(tmp_path: Path) -> None:
    options = argparse.Namespace(cache=tmp_path)
    shared = (Recipe(), options, tmp_path, tmp_path, tmp_path)
    sweeps = {sweep.name: sweep for sweep in (*SWEEPS, *stream.OF_STREAMS)}

    def flag(name: str, of: str) -> str:
        flags = flags_of(Setting(sweeps[of], "FOMC", 1e-3, 1), *shared)
        return flags[flags.index(f"--{name}") + 1]

    assert flag("unit", of="ratio 1 % by rows, scaled steps") == "row"
    assert float(flag("ewc_lambda", of="EWC, lambda 1e7")) == 1e7
    adapter = read_peft_config(Path(flag("peft_config", of="OFT")))
    assert str(adapter.peft_type).endswith("OFT")
    assert adapter.target_modules == "all-linear"
