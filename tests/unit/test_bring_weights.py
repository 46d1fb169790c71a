"""A Hub model's weights are in the cache before anything is decided by them."""

from pathlib import Path
from typing import Any

import pytest

from piece_ds.config.arguments import ModelArguments
from piece_ds.models import loading
from piece_ds.models.loading import bring_weights


class FakeHub:
    """Stands in for huggingface_hub.snapshot_download: a repository with some files."""

    def __init__(self, folder: Path, files: list[str]) -> None:
        self.folder, self.files, self.asked = folder, files, list[list[str]]()

    def __call__(self, repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "user/model"
        self.asked.append(allow_patterns)
        for name in self.files:
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (self.folder / name).touch()
        return str(self.folder)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.safetensors"], {"model.safetensors"}),
        (
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
            {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"},
        ),
        (["pytorch_model.bin", "training_args.bin"], {"pytorch_model.bin"}),
        (["config.json"], set()),
    ],
)
def test_what_transformers_would_load_is_brought_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], wanted: set[str]
) -> None:
    hub = FakeHub(tmp_path, files)
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", hub)
    bring_weights(ModelArguments(model_name_or_path="user/model"))
    assert {path.name for path in tmp_path.iterdir()} == wanted


def test_a_folder_asks_nobody_and_a_lost_network_is_left_to_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", fails)
    bring_weights(ModelArguments(model_name_or_path="user/model"))
    hub = FakeHub(tmp_path, [])
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", hub)
    bring_weights(ModelArguments(model_name_or_path=str(tmp_path)))
    assert hub.asked == []
