"""One object holds the settings of the method: checked, and with the same defaults for flags and library."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest

from piece_ds import select
from piece_ds.cli.main import _parser
from piece_ds.config.method_arguments import MethodArguments
from piece_ds.config.piece import PieceConfig, config_of, split_patterns
from piece_ds.plan.setting import Setting
from piece_ds.runtime.errors import UserError

WRONG = [
    ("ratio", 0.0, r"must be in \(0, 1\], got 0.0"),
    ("ratio", 1.5, r"must be in \(0, 1\], got 1.5"),
    ("ratio", float("nan"), r"must be in \(0, 1\], got nan"),
    ("importance_batch_size", 0, "must be positive, got 0"),
    ("importance_rows", 0, "must be positive, got 0"),
    ("importance_rows", -3, "must be positive, got -3"),
    ("importance_lambda", -1.0, "must be positive, got -1.0"),
    ("lift_rank", 0, "must be positive, got 0"),
    ("budget", "modl", "'modl' is unknown; known: model, layer, tensor. Did you mean 'model'"),
    ("update_mode", "mask", "'mask' is unknown; known: compact, masked. Did you mean 'masked'"),
    ("selected_gradient", "sparse", "'sparse' is unknown"),
    ("statistics_device", "gpu", "'gpu' is unknown"),
]


def test_ranges_are_refused_by_field_and_by_flag() -> None:
    for field, value, message in WRONG:
        with pytest.raises(ValueError, match=f"^{field} {message}"):
            PieceConfig(**{field: value})
        flag = {"ratio": "mask_ratio"}.get(field, field)
        with pytest.raises(UserError, match=f"^--{flag} {message}"):
            MethodArguments(**{flag: value})


def test_it_is_frozen_and_takes_no_positions() -> None:
    with pytest.raises(FrozenInstanceError):
        PieceConfig().ratio = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        PieceConfig("piece-s")  # type: ignore[misc]


def test_settings_by_name_win_and_unknown_ones_are_named() -> None:
    one = PieceConfig(method="piece-f", ratio=0.5)
    assert config_of(one, {"ratio": 0.25}) == PieceConfig(method="piece-f", ratio=0.25)
    with pytest.raises(TypeError, match=r"'rato' is no setting of PIECE\. Did you mean 'ratio'"):
        config_of(None, {"rato": 0.1})


def test_patterns_are_a_text_or_a_sequence() -> None:
    assert PieceConfig(exclude=" *norm*, lm_head* ,").exclude == ("*norm*", "lm_head*")  # type: ignore[arg-type]
    assert split_patterns(["a", " b "]) == ("a", "b")
    assert split_patterns(None) == ()


def test_defaults_agree_everywhere() -> None:
    default = PieceConfig()
    assert MethodArguments().config() == default
    assert default.update_mode == "compact"
    assert default.seed == 42

    plan = _parser().parse_args(["plan"])
    for name in ("update_mode", "ratio", "method"):
        assert getattr(plan, name) == getattr(Setting(), name) == getattr(default, name)
    signature = inspect.signature(select).parameters
    assert (signature["method"].default, signature["ratio"].default) == (default.method, default.ratio)
    assert {field.name for field in fields(PieceConfig)} >= {"exclude", "importance_rows", "seed"}
