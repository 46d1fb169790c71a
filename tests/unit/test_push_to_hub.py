"""Where --push_to_hub sends a run to, and what is refused before it begins; a run that is pushed: end_to_end/."""

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants
from support.hub_server import WRITER, Hub, serve
from transformers import TrainingArguments

from piece_ds.cli.train_hub import remote_of_run
from piece_ds.config.settings import parse
from piece_ds.deltas.remote import Remote
from piece_ds.methods.registry import METHODS
from piece_ds.runtime.errors import UserError


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield server


def arguments(**changes: Any) -> TrainingArguments:
    return TrainingArguments(output_dir="runs/mine", use_cpu=True, **{"push_to_hub": True, **changes})


def test_the_name_is_that_of_the_flag_or_the_folder_in_the_tokens_own_space(hub: Hub) -> None:
    for changes, expected in (
        ({}, Remote("user/mine")),
        ({"hub_model_id": "law"}, Remote("user/law")),
        ({"hub_model_id": "team/law"}, Remote("team/law")),
        ({"hub_model_id": "law", "hub_revision": "second"}, Remote("user/law", "second")),
        ({"hub_token": WRITER}, Remote("user/mine", token=WRITER)),
    ):
        assert remote_of_run(arguments(**changes), "piece-s") == expected
    assert remote_of_run(arguments(push_to_hub=False), "seqft") is None
    assert WRITER not in repr(Remote("user/mine", token=WRITER))


def test_what_cannot_be_pushed_is_refused_in_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"hub_model_id": "a/b/c"}, "expected a repository of the Hub"),
        ({"hub_model_id": "-law"}, "expected a repository of the Hub"),
        ({"hub_revision": " "}, "--revision is empty"),
        ({"hub_token": "hf_nobody"}, "nothing was pushed"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message) as error:
            remote_of_run(arguments(**changes), "piece-s")
        assert "\n" not in str(error.value)
    for name in (name for name, method in METHODS.items() if not method.has_mask):
        with pytest.raises(UserError, match=f"--method {name} has none"):
            remote_of_run(arguments(), name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="switched off"):
        remote_of_run(arguments(), "piece-s")


def test_no_token_is_shown_among_the_settings_of_a_run() -> None:
    shown = parse(["--hub_token", WRITER, "--push_to_hub", "true", "--hub_model_id", "a/b"]).shown()
    assert WRITER not in repr(shown)
    assert shown["hub_model_id"] == "a/b"
