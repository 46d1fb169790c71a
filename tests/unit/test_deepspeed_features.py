"""Every key of DeepSpeed that masks are not proven with is refused by its name, in files and of engines."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.runtime.config as deepspeed_config
import pytest
import torch
from support.engines import Setup, make_engine
from support.ranks import on_ranks
from torch import nn

from piece_ds import attach, collect_statistics, estimate_mask
from piece_ds.config.deepspeed_features import REFUSED, Feature, refused_feature
from piece_ds.preflight.checks import check_deepspeed_file
from piece_ds.runtime.errors import UserError
from piece_ds.runtime.process import start_distributed
from piece_ds.zero.supported import adapter_for

ROOT = Path(__file__).parents[2]


def with_value(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def other_than(feature: Feature) -> Any:
    """A value that is refused."""
    first = feature.allowed[0] if feature.allowed else None
    return True if first is False else {str: "other", int: 7}.get(type(first), {"enabled": True})


def test_files_are_refused_key_by_key(tmp_path: Path) -> None:
    for feature in REFUSED:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(with_value(feature.key, other_than(feature))))
        with pytest.raises(UserError) as caught:
            check_deepspeed_file(str(path))
        message = str(caught.value)
        assert feature.key in message
        assert feature.reason in message
        assert feature.remedy in message
        assert "\n" not in message


def test_what_is_no_engine_is_refused_by_every_function_that_takes_one() -> None:
    """A model that nothing has wrapped, and all that deepspeed.initialize() returned."""
    model = nn.Linear(2, 2)
    mask: Any = None
    for given, name in ((model, "Linear"), ((model, None), "tuple"), (None, "NoneType")):
        for call in (
            lambda given=given: estimate_mask(given, [{}], method="random"),
            lambda given=given: collect_statistics(given, [{}]),
            lambda given=given: attach(given, mask),
        ):
            with pytest.raises(UserError, match=f"{name}, which is no DeepSpeed engine"):
                call()


def test_engines_are_refused_key_by_key() -> None:
    for feature in REFUSED:
        config = SimpleNamespace(_param_dict=with_value(feature.key, other_than(feature)))
        engine = type("DeepSpeedEngine", (SimpleNamespace,), {})(
            module=None, _config=config, zero_optimization_stage=lambda: 0
        )
        if feature.in_commands:
            assert refused_feature(config._param_dict, of_command=False) is None
        else:
            with pytest.raises(UserError, match=feature.key):
                adapter_for(engine)


def test_a_real_engine_with_experts_on_other_ranks_is_refused_with_what_to_use_instead() -> None:
    """DeepSpeed's own MoE layer on two ranks, each with an expert of its own under one name."""

    def work() -> str:
        from deepspeed.moe.layer import MoE

        start_distributed()
        model = nn.Sequential(MoE(8, nn.Linear(8, 8), num_experts=2, ep_size=2))
        engine = make_engine(model, Setup(0), torch.optim.AdamW(model.parameters(), lr=1e-3))
        with pytest.raises(UserError) as caught:
            adapter_for(engine)
        return str(caught.value)

    for message in on_ranks(2, work):
        assert "MoE layers: expert gradients are reduced over other groups; use a model of transformers" in message
        assert "\n" not in message


def test_values_that_change_nothing_pass() -> None:
    for feature in REFUSED:
        for value in (None, *feature.allowed):
            assert refused_feature(with_value(feature.key, value), of_command=True) is None
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert refused_feature(json.loads(path.read_text()), of_command=True) is None


def test_what_deepspeed_has_removed_is_refused_before_it_raises() -> None:
    keys = {feature.key for feature in REFUSED}
    removed = deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
    assert removed <= keys
    assert {f"zero_optimization.{key}" for key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS} <= keys


def test_every_key_has_its_line_in_the_docs() -> None:
    lines = (ROOT / "docs" / "deepspeed.md").read_text().splitlines()
    for feature in REFUSED:
        assert any(f"`{feature.key}`" in line and "refused" in line for line in lines), feature.key
