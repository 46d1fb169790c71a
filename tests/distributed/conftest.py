"""Jobs are run once a session, when the first test asks for their results."""

import hashlib
from pathlib import Path

import pytest
from support.jobs import Job, Results, run_job

MOST_CHARACTERS = 120


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """job(module, num_ranks, *arguments) -> its results; job.folder(module, num_ranks) -> what it wrote."""
    base = tmp_path_factory.mktemp("jobs")
    done: dict[tuple, Results | Exception] = {}

    def run(module: str, num_ranks: int, *arguments: str) -> Results:
        key = (module, num_ranks, *arguments)
        if key not in done:
            try:
                done[key] = run_job(f"support.{module}", num_ranks, folder(module, num_ranks, *arguments), *arguments)
            except AssertionError as error:  # a broken job is not started again for every test
                done[key] = error
        result = done[key]
        if isinstance(result, Exception):
            raise result
        return result

    def folder(module: str, num_ranks: int, *arguments: str) -> Path:
        name = "-".join([module, str(num_ranks), *(Path(a).name for a in arguments)])
        if len(name) > MOST_CHARACTERS:  # file systems end at 255: many cases are told apart by a hash
            name = f"{name[:MOST_CHARACTERS]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        return base / name

    run.folder = folder
    return run
