"""TRL's trainers with PieceCallback, from a script that no launcher started or on two ranks: masked and compact."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.launches import ROOT, free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed: its trainers are what is tried"),
]


PAGE = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.partition("\n## TRL\n")[2].partition("\n## ")[0], re.DOTALL)
# What the examples take from the reader's own code.
BEFORE = """
import datasets, torch
from piece_ds import PieceCallback
from support.trl_job import CHAT, COMMON, PREFERENCES, PROMPTS, length_reward as reward, make_model, make_chat_tokenizer

tokenizer, model, classifier = make_chat_tokenizer(), make_model("sft"), make_model("reward")
rows, preferences, prompts = (datasets.Dataset.from_list(part) for part in (CHAT, PREFERENCES, PROMPTS))
options = COMMON
"""
AFTER = """
assert trainer.state.global_step == 2
"""


def started(*command: str, cwd: Path | None = None) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment = {**kept, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def run(kind: str, mode: str, folder: Path, stage: int = 2, num_ranks: int = 1) -> dict[str, Any]:
    folder.mkdir(parents=True)
    launcher = ["torch.distributed.run", "--nproc_per_node", str(num_ranks), "--master_port", str(free_port()), "-m"]
    started("-m", *(launcher if num_ranks > 1 else []), "support.trl_job", kind, mode, str(folder), str(stage))
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


BOTH_MODES = ["assistant-only", "completion-only", "packing", "dpo", "reward", "grpo", "rloo", "orpo", "gmpo"]
MASKED = ["kto", "distillation", "padding-free", "dft", "dpo:ipo+sigmoid_norm", "grpo:batch"]


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, mode) for kind in BOTH_MODES for mode in ("masked", "compact")), *((kind, "masked") for kind in MASKED)],
)
def test_only_selected_weights_move_and_the_delta_holds_them(kind: str, mode: str, tmp_path: Path) -> None:
    """And the sums that chose them are plain torch's, of the trainer's own loss on the model alone."""
    found = run(kind, mode, tmp_path / "out")
    assert found["outside"] == 0
    assert found["inside"] > 0
    assert sum(len(where) for where in found["index"].values()) == found["wanted"]
    assert found["size"] > 0
    assert found["error"] < 1e-5
    delta = load_file(tmp_path / "out" / "delta.safetensors")
    indices = {
        name.removesuffix(".indices"): value.tolist() for name, value in delta.items() if name.endswith(".indices")
    }
    assert all(set(indices[name]) <= set(found["index"][name]) for name in indices)
    moved = sum(int((delta[f"{name}.values"] != delta[f"{name}.previous"]).sum()) for name in indices)
    assert moved == found["inside"]


@pytest.mark.parametrize(
    ("kind", "mode", "stage"),
    [
        ("dpo", "masked", 2),
        ("dpo", "compact", 3),
        ("dpo:precompute", "compact", 2),
        ("dpo:ipo+sigmoid_norm", "compact", 2),
        ("reward", "compact", 2),
        ("padding-free", "compact", 2),
        ("kto", "masked", 2),
        ("kto", "compact", 3),
        ("rloo", "masked", 2),
        ("distillation", "compact", 2),
        ("grpo", "masked", 3),
        ("grpo", "compact", 2),
        ("grpo:batch", "compact", 3),
    ],
)
def test_on_two_ranks_too_where_micro_batches_of_importance_are_not_all_equal(
    kind: str, mode: str, stage: int, tmp_path: Path
) -> None:
    """The mask is one rank's, whatever the loss gathers: KTO a mean over ranks, GRPO a number of tokens, or rewards.

    So are the completions that it is taken of.
    """
    found = run(kind, mode, tmp_path / "two", stage, num_ranks=2)
    assert found["outside"] == 0
    assert found["inside"] > 0
    alone = kind.removesuffix(":precompute")  # which needs a launcher
    assert found["index"] == run(alone, mode, tmp_path / "one")["index"]


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_method_that_reads_activations_reads_those_of_the_trainers_loss(kind: str, tmp_path: Path) -> None:
    found = run(kind, "migu", tmp_path / "out")
    assert found["outside"] == 0
    assert found["inside"] > 0


@pytest.mark.parametrize("kind", ["online_dpo", "a2po"])
def test_a_trainer_whose_loss_only_its_own_step_knows_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    assert "give mask_file" in run(kind, "masked", tmp_path / "out")["refused"]


def test_importance_is_that_of_the_loss_that_is_trained(tmp_path: Path) -> None:
    """DFT weighs each token by its probability; with the plain loss' importance the masks would be the same."""
    plain, dft = (run(kind, "masked", tmp_path / kind)["index"] for kind in ("assistant-only", "dft"))
    assert plain != dft


@pytest.mark.parametrize("kind", ["completion-only", "packing", "dpo", "grpo"])
def test_general_text_joins_every_trainer_whose_model_predicts_tokens(kind: str, tmp_path: Path) -> None:
    found = run(kind, "general", tmp_path / "out")
    assert found["outside"] == 0
    assert found["inside"] > 0
    first, second = [row for row in found["log"] if "general_kl" in row]
    assert abs(first["general_kl"]) < 1e-5
    assert second["general_kl"] > 1e-5
    assert first["general_tokens"] == second["general_tokens"] == 11


def test_a_reward_model_has_no_loss_on_general_text(tmp_path: Path) -> None:
    assert "needs a model that predicts tokens" in run("reward", "general", tmp_path / "out")["refused"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: str(re.search(r"import (\w+)Config", text)[1]))
def test_the_examples_of_the_page_run_as_they_stand(example: str, tmp_path: Path) -> None:
    started("-c", BEFORE + example + AFTER, cwd=tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "mask.safetensors").is_file()
    assert (folder / "delta.safetensors").is_file()


def test_every_trainer_has_an_example() -> None:
    assert [re.search(r"(\w+)Trainer\(", text)[1] for text in EXAMPLES] == ["SFT", "DPO", "Reward", "GRPO"]
