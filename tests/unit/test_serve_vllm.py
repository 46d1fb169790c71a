"""examples/serve_vllm.py without vLLM: what it reads, what it writes on a switch, and how it knows its base.

With PIECE_DS_VLLM_PYTHON (the python of an environment with vLLM) a real engine is switched among tasks, slowly.
"""

import importlib.util
import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from support.deltas import make_run, move_selected, random_mask
from support.launches import make_model_folder
from torch import nn
from transformers import AutoModelForCausalLM

from piece_ds.__main__ import main
from piece_ds.checkpoint.delta_file import save_delta
from piece_ds.zero.weights import read_selected

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_vllm.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve_vllm", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fused(nn.Module):
    """A model that loads as vLLM's do: q and k of a checkpoint are parts of one parameter, filled by copy_."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.arange(24.0).view(4, 6).bfloat16(), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(6).bfloat16(), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        places = {"q.weight": self.qk.data[:2], "k.weight": self.qk.data[2:], "norm.weight": self.norm.data}
        for name, loaded in weights:
            places[name].copy_(loaded)
        return set(places)


def test_the_base_is_known_by_comparing_through_the_models_own_loader(example: ModuleType) -> None:
    model = Fused()
    before = model.qk.clone()
    right = {
        "q.weight": ((2, 6), torch.tensor([0, 7]), torch.tensor([0.0, 7.0]).bfloat16()),
        "k.weight": ((2, 6), torch.tensor([11]), torch.tensor([23.0]).bfloat16()),
    }
    assert example.count_other(model, right) == 0
    model.qk.data[3, 5] = 0
    assert example.count_other(model, right) == 1
    right["norm.weight"] = ((6,), torch.tensor([1, 2]), torch.tensor([1.0, 5.0]).bfloat16())
    assert example.count_other(model, right) == 2
    # Nothing was written, and copying is what it was.
    assert torch.equal(model.qk[:3], before[:3])
    assert torch.equal(torch.zeros(2).copy_(torch.ones(2)), torch.ones(2))


def test_a_switch_takes_back_what_the_next_task_leaves_alone(example: ModuleType) -> None:
    def values(positions: list[int], numbers: list[float]) -> tuple:
        return (10,), torch.tensor(positions, dtype=torch.int32), torch.tensor(numbers)

    old = {"a": values([1, 3, 5], [10.0, 30.0, 50.0]), "b": values([0], [7.0])}
    new = {"a": values([3, 4], [0.3, 0.4]), "c": values([2], [0.2])}
    both = example.overlaid(old, new)
    assert both.keys() == {"a", "b", "c"}
    shape, positions, numbers = both["a"]
    found = {int(position): round(float(number), 3) for position, number in zip(positions, numbers, strict=True)}
    assert (shape, found) == ((10,), {1: 10.0, 5: 50.0, 3: 0.3, 4: 0.4})
    assert example.overlaid({}, new) == new
    assert example.overlaid(old, {}) == old


def test_exported_patches_are_read_whole(example: ModuleType, tmp_path: Path) -> None:
    run = make_run(tmp_path, density=0.02)
    main(["delta", "export", str(run.deltas[0]), "--format", "vllm", "--output", str(tmp_path / "law.safetensors")])
    task = example.Task(tmp_path / "law.safetensors")
    base = dict(AutoModelForCausalLM.from_pretrained(run.base).named_parameters())
    assert task.name == "law"
    for name, (shape, positions, old) in task.previous.items():
        assert shape == tuple(base[name].shape)
        assert torch.equal(base[name].view(-1)[positions.long()], old)
    main(["delta", "compose", str(run.deltas[0]), "--without_previous", "--output", str(tmp_path / "one")])
    main(["delta", "export", str(tmp_path / "one"), "--format", "vllm", "--output", str(tmp_path / "bare.safetensors")])
    with pytest.raises(SystemExit, match="has no previous values"):
        example.Task(tmp_path / "bare.safetensors")


PYTHON = os.environ.get("PIECE_DS_VLLM_PYTHON")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="PIECE_DS_VLLM_PYTHON names no python with vLLM")
def test_a_running_engine_switched_among_tasks_answers_as_the_merged_models_do(tmp_path: Path) -> None:
    base = make_model_folder(tmp_path / "base", torch.bfloat16, hidden_size=128)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"what {n}"}) + "\n" for n in range(50)))
    patches = []
    for task in range(3):
        model = AutoModelForCausalLM.from_pretrained(base)
        mask = random_mask(model, task, 0.05, lambda name: "proj" in name or "norm" in name)
        previous = read_selected(model, mask)
        move_selected(model, mask, task)
        delta, merged = tmp_path / f"{task}.delta", tmp_path / f"merged-{task}"
        save_delta(delta, model, mask, previous)
        main(["delta", "merge", str(base), str(delta), "--output", str(merged)])
        patches.append(tmp_path / f"task-{task}.safetensors")
        main(["delta", "export", str(delta), "--format", "vllm", "--model", str(base), "--output", str(patches[-1])])

    def served(folder: Path, *given: Path) -> subprocess.CompletedProcess[str]:
        command = [PYTHON, EXAMPLE, folder, *given, "--prompts", tmp_path / "prompts.jsonl"]
        command += ["--max_model_len", 128, "--max_tokens", 16]
        output = tmp_path / f"{folder.name}.json"
        variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [*map(str, command), "--output", str(output)], env=variables, capture_output=True, text=True
        )

    assert (run := served(base, *patches)).returncode == 0, run.stderr[-3000:]
    tokens = json.loads((tmp_path / "base.json").read_text())["tokens"]
    assert tokens["base"] == tokens["base again"]
    for task in range(3):
        assert served(tmp_path / f"merged-{task}").returncode == 0
        assert tokens[f"task-{task}"] == json.loads((tmp_path / f"merged-{task}.json").read_text())["tokens"]["base"]
        assert tokens[f"task-{task}"] != tokens["base"]
    # On another base nothing is written.
    wrong = served(tmp_path / "merged-0", patches[1])
    assert wrong.returncode == 1
    assert "is of another base" in wrong.stderr
