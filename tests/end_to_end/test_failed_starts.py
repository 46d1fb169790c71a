"""A start that fails leaves no claim on --output_dir: the mended command runs in the same folder, on two ranks."""

from pathlib import Path

import pytest
from support.failed_starts_job import FAILURES
from support.jobs import Results, result_of, run_job
from support.launches import make_model_folder, make_rows, write_rows

MESSAGES = {
    "damaged-model": "UserError: .*model.safetensors is damaged",
    "reporter": "UserError: .*the tracking server does not answer",
    "engine": "RuntimeError: no room for the engine",
    "statistics": "RuntimeError: no room for a micro-batch",
    "user-error-in-selection": "UserError: of another model",
}


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("failed_starts")
    make_model_folder(folder / "model")
    write_rows(folder / "rows.json", make_rows(1, 8, ("A", "B")))
    return run_job("support.failed_starts_job", 2, folder)


@pytest.mark.parametrize("name", list(FAILURES))
def test_the_mended_command_runs_in_the_folder_of_the_failed_one(starts: Results, name: str) -> None:
    import re

    got = result_of(starts, name)
    assert re.match(MESSAGES[name], got["message"])
    assert not got["left"], f"left behind: {got['left']}"
    assert {"run.json", "results.json", str(Path("00-rows") / "mask.safetensors")} <= set(got["mended"])
