"""The first run of a recipe on a model of the Hub, of which the cache holds nothing: it is the run of its folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.hub_server import serve
from support.stream_runs import Material


@pytest.mark.slow  # tests/unit/test_bring_weights.py guards the download
def test_a_first_run_from_the_hub_is_the_run_of_its_folder(material: Material, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in material.base.iterdir() if path.is_file()}
    with serve() as hub:
        hub.add("user/model", files)
        cache = {"HF_HOME": str(tmp_path / "hub"), "PIECE_DS_CACHE": str(tmp_path / "cache")}
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        for name, model in (("hub", "user/model"), ("folder", material.base)):
            flags = material.short_flags(
                str(tmp_path / name),
                deepspeed="zero0",
                model_name_or_path=model,
                recipe="mask",
                general_text="self",
                method=None,
                mask_ratio=None,
                learning_rate=None,
                use_cpu=True,
            )
            command = [sys.executable, "-m", "piece_ds", "train", *flags]
            run = subprocess.run(command, env={**os.environ, **cache, **online}, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
            assert "in proportion to this model's weights" in run.stderr + run.stdout
    found = [load_file(next((tmp_path / name).glob("00-*")) / "delta.safetensors") for name in ("hub", "folder")]
    assert {name: values.tolist() for name, values in found[0].items()} == {
        name: values.tolist() for name, values in found[1].items()
    }
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("hub", "folder")]
    assert results[0]["matrix"] == results[1]["matrix"]
