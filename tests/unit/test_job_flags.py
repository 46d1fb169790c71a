"""What each job needs among its flags, and what it does without: told before a file is read."""

import pytest

from piece_ds.config.settings import parse
from piece_ds.methods.registry import find_method
from piece_ds.preflight.preflight import EVALUATE, SELECT, TRAIN, _check_flags
from piece_ds.runtime.errors import UserError

MODEL, FILE, OUTPUT = ["--model_name_or_path", "m"], ["--train_file", "a.json"], ["--output_file", "o"]
TASKS = ["--task_dir", "d", "--tasks", "a"]
RANKS = ["--sequence_parallel_size", "2"]


@pytest.mark.parametrize(
    ("job", "flags"),
    [
        (TRAIN, FILE),
        (TRAIN, TASKS),
        (TRAIN, [*FILE, *RANKS]),
        (TRAIN, [*FILE, "--output_dir", "out"]),
        (TRAIN, [*FILE, "--packing"]),
        (TRAIN, [*FILE, "--packing", "--method", "seqft"]),
        (SELECT, [*MODEL, *FILE, *OUTPUT]),
        (SELECT, [*MODEL, *FILE, *OUTPUT, "--packing"]),
        (EVALUATE, [*MODEL, *FILE, *OUTPUT]),
        (EVALUATE, [*MODEL, *TASKS, *OUTPUT]),
        (EVALUATE, [*MODEL, *TASKS, *OUTPUT, "--method", "seqft"]),
    ],
)
def test_a_job_takes_its_own_flags(job: str, flags: list[str]) -> None:
    settings = parse(flags)
    _check_flags(settings, job, find_method(settings.method.method))


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        (TRAIN, [*FILE, "--output_dir", ""], "--output_dir expects a folder"),
        (TRAIN, [], "no data: give --train_file"),
        (TRAIN, [*FILE, "--packing", "--method", "ewc"], "--packing is not proven with --method ewc"),
        (SELECT, [*MODEL, *FILE, *OUTPUT, *RANKS], "--sequence_parallel_size belongs to train"),
        (SELECT, [*MODEL, *FILE, *OUTPUT, "--method", "seqft"], "--method seqft has no mask.*piece-s"),
        (SELECT, [*MODEL, *OUTPUT], "select needs --train_file F and --output_file MASK"),
        (SELECT, [*MODEL, *TASKS, *OUTPUT], "select needs --train_file F and --output_file MASK"),
        (SELECT, [*MODEL, *FILE], "select needs --train_file F and --output_file MASK"),
        (SELECT, [*FILE, *OUTPUT], "select needs --model_name_or_path"),
        (EVALUATE, [*MODEL, *FILE, *OUTPUT, *RANKS], "--sequence_parallel_size belongs to train"),
        (EVALUATE, [*MODEL, *OUTPUT], "evaluate needs --task_dir D with --tasks A,B, and --output_file F"),
        (EVALUATE, [*MODEL, *FILE], "evaluate needs --task_dir D with --tasks A,B, and --output_file F"),
        (EVALUATE, [*TASKS, *OUTPUT], "evaluate needs --model_name_or_path"),
    ],
)
def test_what_a_job_lacks_or_cannot_do_is_named(job: str, flags: list[str], message: str) -> None:
    settings = parse(flags)
    with pytest.raises(UserError, match=message):
        _check_flags(settings, job, find_method(settings.method.method))
