"""--push_to_hub: a run is published when it ends, as `piece_ds delta push` publishes it, and pulled again."""

import json
import subprocess
from pathlib import Path

import pytest
from support.hub_server import READER, WRITER, Hub, serve
from support.launches import ROOT, TIMEOUT_SECONDS, command_line, environment, error_lines, same_bits, weights
from support.stream_runs import Material

from piece_ds.__main__ import main

Run = subprocess.CompletedProcess[str]


def trained(material: Material, hub: Hub, name: str, token: str, **changes: object) -> Run:
    """A short run with --push_to_hub, in one process, whose Hub is the stand-in."""
    flags = material.short_flags(name, push_to_hub=True, deepspeed="zero2", **changes)
    variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token}
    return subprocess.run(
        command_line("python", 1, "train.py", *flags),
        cwd=ROOT,
        env={**environment(), **variables},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )


def test_a_run_is_pushed_when_it_ends(material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deltas, card and manifest, and neither checkpoints nor the token."""
    with serve() as hub:
        run = trained(material, hub, "pushed", WRITER, hub_model_id="mine", hub_private_repo=True, save_steps=1)
        assert run.returncode == 0, run.stderr[-3000:]
        assert "pushed 1 delta," in run.stdout
        repository = hub.repositories["user/mine"]
        assert repository.private
        names = set(repository.files) - {".gitattributes"}
        assert {name for name in names if not name.startswith("figures/")} == {
            "00-train/delta.safetensors",
            "README.md",
            "piece_ds_deltas.json",
        }
        folder = material.out("pushed")
        assert (
            repository.files["00-train/delta.safetensors"] == (folder / "00-train" / "delta.safetensors").read_bytes()
        )
        told = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert not any(WRITER.encode() in content for content in (*told, *repository.files.values()))
    # What was pushed goes on the base.
    for name, content in repository.files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    main(["delta", "apply", str(material.base), str(tmp_path / "pulled"), "--output", str(tmp_path / "model")])
    assert same_bits(weights(tmp_path / "model"), weights(folder / "00-train" / "model"))


@pytest.mark.slow
def test_a_hub_that_does_not_know_the_token_ends_the_run_before_it_begins(material: Material) -> None:
    with serve() as hub:
        run = trained(material, hub, "unknown", "hf_nobody", hub_model_id="user/mine")
        assert run.returncode == 2
        assert len(error_lines(run)) == 1
        assert "nothing was pushed" in error_lines(run)[0]
    assert not material.out("unknown").exists()


@pytest.mark.slow
def test_a_hub_that_refuses_the_push_leaves_a_complete_run_and_says_how_to_push_it(material: Material) -> None:
    with serve() as hub:
        hub.add("user/mine")
        run = trained(material, hub, "refused", READER, hub_model_id="user/mine")
        assert run.returncode == 1
        assert len(error_lines(run)) == 1
        assert "is complete, but nothing was pushed" in error_lines(run)[0]
        assert f"piece_ds delta push {material.out('refused')} hf://user/mine" in error_lines(run)[0]
        assert hub.repositories["user/mine"].files == {}
    results = json.loads((material.out("refused") / "results.json").read_text())
    assert len(results["matrix"]["loss"]["after"]) == 1
    assert (material.out("refused") / "00-train" / "delta.safetensors").is_file()
