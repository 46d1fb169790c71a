"""Settings that a method does not read are said, with the methods that do; those that it reads are not."""

from dataclasses import fields

import pytest

from piece_ds.config.method_arguments import READERS, BaselineArguments
from piece_ds.config.settings import parse
from piece_ds.methods.registry import METHODS
from piece_ds.preflight.checks import check_sources


def test_every_setting_of_a_baseline_names_methods_that_are_there() -> None:
    assert READERS.keys() == {field.name for field in fields(BaselineArguments)}
    for name, methods in READERS.items():
        assert set(methods) <= METHODS.keys(), name


def test_settings_that_the_method_does_not_read_are_said(caplog: pytest.LogCaptureFixture) -> None:
    for flags, said in (
        ("--method piece-s --lora_r 16", "with --method piece-s: --lora_r (of lora, o-lora)"),
        ("--method ewc --ewc_lambda 3 --memory_ratio 0.2", "--memory_ratio (of gem, replay, replay-online)"),
        (
            "--method seqft --mask_ratio 0.1 --update_mode masked",
            "--mask_ratio (of methods with a mask), --update_mode",
        ),
        ("--method o-lora --lora_r 16 --o_lora_lambda 1", ""),
        ("--method piece-s --mask_ratio 0.1 --update_mode masked", ""),
        ("--recipe full --general_text self", ""),
    ):
        caplog.clear()
        check_sources(parse(flags.split()), 2)
        assert said in caplog.text, flags
        assert ("without effect" in caplog.text) == bool(said), flags
