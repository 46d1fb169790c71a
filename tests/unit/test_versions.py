"""The versions that a run writes down, also from a clone that was never installed."""

import importlib.metadata

import pytest

import piece_ds
from piece_ds.runtime.versions import versions


def test_a_clone_on_the_path_knows_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    found = versions()
    assert found["piece_ds"] == piece_ds.__version__
    assert {"torch", "deepspeed", "transformers", "accelerate", "python", "device"} < found.keys()
