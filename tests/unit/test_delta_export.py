"""Exports are what the other tools read: PEFT itself loads the adapter; vLLM's patch is applied as its loader does."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from support.deltas import make_run
from transformers import AutoModelForCausalLM

from piece_ds.__main__ import main
from piece_ds.deltas.delta import Change, open_delta
from piece_ds.deltas.export_peft import _shira
from piece_ds.state.weights_hash import bits_of


def linear(name: str) -> bool:
    return name.endswith("proj.weight") or name == "lm_head.weight"


def delta(*arguments: object) -> None:
    main(["delta", *map(str, arguments)])


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        delta(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_loads_the_adapter_and_gives_the_tasks_logits(
    tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, dtype=dtype, select=linear)
    delta("apply", run.base, run.deltas[0], "--output", tmp_path / "task")
    delta("export", run.deltas[0], "--format", "peft", "--model", run.base, "--output", tmp_path / "adapter")
    num_inexact = int(capsys.readouterr().out.splitlines()[-1].split("bytes; ")[1].split()[0])
    base = AutoModelForCausalLM.from_pretrained(run.base).eval()
    ids = torch.arange(40).view(2, 20)
    plain = base(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
    task = AutoModelForCausalLM.from_pretrained(tmp_path / "task").eval()(input_ids=ids).logits
    assert (plain - task).abs().max() > 0.01
    if num_inexact == 0:
        assert torch.equal(adapted, task)
    else:  # the last bit of a few weights
        assert num_inexact < 0.05 * open_delta(run.deltas[0]).num_selected
        assert (adapted - task).abs().max() < 1e-5
    assert num_inexact == 0 or dtype == torch.float32


def test_inexact_differences_are_counted() -> None:
    """1e-9 cannot be reached from 1 by adding an fp32 number."""
    index = torch.tensor([0, 3, 5])
    change = Change(index, torch.tensor([1e-9, 2.0, 0.5]), torch.tensor([1.0, 1.0, 0.5]))
    positions, weight, num_inexact = _shira(change, (2, 3), 1)
    assert num_inexact == 1
    assert positions.tolist() == [[0, 1, 1, 0, 0], [0, 0, 2, 0, 0]]
    assert weight.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]


WHOLE = {
    # family: (what may change, a module that is then held whole)
    "llama": (lambda name: "embed" not in name, "model.norm"),
    "qwen3": (lambda name: "embed" not in name, "model.layers.0.self_attn.q_norm"),
    "neox": (lambda name: True, "gpt_neox.layers.0.attention.query_key_value"),
    "mixtral": (lambda name: True, "model.layers.0.mlp.experts"),
}


@pytest.mark.parametrize("family", WHOLE)
def test_peft_holds_other_modules_whole_and_gives_the_merged_models_bits(
    tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bf16, from the folder alone: norms, biases, untied embeddings, routers and stacked experts."""
    select, module = WHOLE[family]
    run = make_run(tmp_path, family, select=select, density=0.02)
    delta("merge", run.base, run.deltas[0], "--output", tmp_path / "task")
    delta("export", run.deltas[0], "--format", "peft", "--model", run.base, "--output", tmp_path / "adapter")
    said = capsys.readouterr().out.splitlines()[-1]
    assert " 0 of " in said
    held = re.search(r"; (\d+) (modules?) held whole, ", said)
    assert held is not None
    assert held[2] == ("module" if held[1] == "1" else "modules")
    # PEFT gives every module as many places as the fullest one needs: said if most of them are padding.
    padding = re.search(r"; (\d+) places are padding, .* \(--format piece-peft has none\)", said)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    places = {name: tensor.numel() for name, tensor in stored.items() if name.endswith(".shira_weight")}
    changed = open_delta(run.deltas[0]).changes()
    used = sum(c.index.numel() for n, c in changed if f"base_model.model.{n[:-7]}.shira_weight" in places)
    assert (padding is None) == (sum(places.values()) - used <= open_delta(run.deltas[0]).num_selected)
    assert padding is None or int(padding[1]) == sum(places.values()) - used
    assert padding is not None or family in ("neox", "mixtral")
    assert module in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"]
    # PEFT 0.21 cannot put back a module without a `weight` when it merges.
    merges = family != "mixtral"
    assert ("model.layers.0.mlp.experts, but cannot merge it (--format piece-peft can)" in said) is not merges
    assert_is_the_task(tmp_path, merges)


def test_peft_holds_a_delta_without_linear_weights(tmp_path: Path) -> None:
    """Norms alone, as --method layernorm changes them."""
    run = make_run(tmp_path, select=lambda name: "norm" in name, density=0.5)
    delta("merge", run.base, run.deltas[0], "--output", tmp_path / "task")
    delta("export", run.deltas[0], "--format", "peft", "--model", run.base, "--output", tmp_path / "adapter")
    assert_is_the_task(tmp_path)


def assert_is_the_task(root: Path, merges: bool = True) -> None:
    """root/base with root/adapter has the logits, and merged by PEFT the weights, of root/task."""
    base = AutoModelForCausalLM.from_pretrained(root / "base").eval()
    ids = torch.arange(40).view(2, 20)
    adapted = PeftModel.from_pretrained(base, root / "adapter").eval()
    task = AutoModelForCausalLM.from_pretrained(root / "task").eval()
    assert torch.equal(adapted(input_ids=ids).logits, task(input_ids=ids).logits)
    if merges:
        merged = dict(adapted.merge_and_unload().named_parameters())
        assert all(torch.equal(merged[name], param) for name, param in task.named_parameters())


def test_what_peft_cannot_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ("gpt-oss", lambda name: "sinks" in name or linear(name), "sinks', which is tied"),
        ("qwen3", lambda name: "embed_tokens" in name or linear(name), "embed_tokens.weight', which is tied"),
    ]
    for number, (family, select, message) in enumerate(cases):
        root = tmp_path / str(number)
        run = make_run(root, family, select=select, density=0.1)
        out = ["--format", "peft", "--output", root / "adapter", "--model", run.base]
        said = refuse(capsys, "export", run.deltas[0], *out)
        assert message in said
        assert "--format piece-peft holds every change" in said
        assert not (root / "adapter").exists()
    assert "needs --model" in refuse(capsys, "export", run.deltas[0], *out[:-2])
    assert "takes one delta" in refuse(capsys, "export", run.folder, *out)
    assert "in task order" in refuse(capsys, "export", run.deltas[1], *out)
    assert not (root / "adapter").exists()


def test_peft_cannot_hold_most_of_a_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, select=lambda name: "k_proj" in name, density=0.9)
    error = refuse(capsys, "export", run.deltas[0], "--format", "peft", "--model", run.base, "--output", tmp_path / "a")
    assert "SHiRA gives every module" in error


def test_peft_needs_previous_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, select=linear, with_previous=False)
    error = refuse(capsys, "export", run.deltas[0], "--format", "peft", "--model", run.base, "--output", tmp_path / "a")
    assert "has no previous values" in error


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_vllm_patch_in_checkpoint_coordinates_gives_the_tasks_checkpoint(tmp_path: Path, family: str) -> None:
    """As vLLM's loader: full tensors of NaN, values copied in at flat indices, NaN left alone."""
    run = make_run(tmp_path, family)
    delta("apply", run.base, run.deltas[0], "--output", tmp_path / "task")
    delta("export", run.deltas[0], "--format", "vllm", "--model", run.base, "--output", tmp_path / "patch.safetensors")
    with safe_open(tmp_path / "patch.safetensors", framework="pt") as file:
        shapes = json.loads(file.metadata()["full_shapes"])
        patches = {name: (file.get_tensor(f"{name}.indices"), file.get_tensor(f"{name}.values")) for name in shapes}
    found, expected = load_file(run.base / "model.safetensors"), load_file(tmp_path / "task" / "model.safetensors")
    for name, (indices, values) in patches.items():
        assert indices.dtype == torch.int32
        assert values.dtype == found[name].dtype
        staged = torch.full(shapes[name], float("nan"), dtype=values.dtype)
        staged.view(-1).index_copy_(0, indices.long(), values)
        found[name] = torch.where(staged.isnan(), found[name], staged)
    assert all(torch.equal(bits_of(found[name]), bits_of(expected[name])) for name in expected)


def test_vllm_patch_without_a_model_has_the_parameters_names(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    delta("export", run.deltas[0], "--format", "vllm", "--output", tmp_path / "patch.safetensors")
    names = {name.rpartition(".")[0] for name in load_file(tmp_path / "patch.safetensors")}
    assert names == set(open_delta(run.deltas[0]).shapes)


def test_lists_and_tables_say_what_is_in_a_delta(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    delta("list", run.folder)
    printed = capsys.readouterr().out
    deltas = [open_delta(path) for path in run.deltas]
    assert all(str(d.num_selected) in printed and str(d.base_fingerprint) in printed for d in deltas)
    delta("inspect", run.deltas[0].parent)
    printed = capsys.readouterr().out
    assert f"{deltas[0].num_selected} of " in printed
    assert str(deltas[0].metadata["model_fingerprint"]) in printed
    change = deltas[0].change("lm_head.weight")
    row = next(line for line in printed.splitlines() if "lm_head" in line and "%" in line and "layer" not in line)
    distance = (change.values.double() - change.previous.double()).abs()
    assert str(distance.numel()) in row
    assert f"{distance.mean():.3g}" in row
    assert f"{distance.max():.3g}" in row

    # The same of all parameters together, to the last column.
    changes = [deltas[0].change(name) for name in deltas[0].shapes]
    before, after = (torch.cat([getattr(c, part).double() for c in changes]) for part in ("previous", "values"))
    moved = (after - before).abs()
    row = next(line for line in printed.splitlines() if line.strip().startswith("all ") and "%" in line)
    assert re.split(r"  +", row.strip()) == [
        "all",
        str(moved.numel()),
        f"{moved.count_nonzero() / moved.numel():.1%}",
        f"{moved.mean():.3g}",
        f"{moved.max():.3g}",
        f"{moved.mean() / before.abs().mean():.3g}",
    ]

    # What the summary says of a delta that can be reverted, and of one that cannot.
    delta("compose", run.deltas[0], "--without_previous", "--output", tmp_path / "one-way")
    for path, previous in ((run.deltas[0], "yes"), (tmp_path / "one-way", "no: cannot be reverted")):
        delta("inspect", path)
        printed, known = capsys.readouterr().out, open_delta(path)
        said = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in printed.splitlines() if "  " in line.strip())
        assert said["previous values"] == previous
        assert said["selected"] == f"{known.num_selected} of {known.metadata['total']}"
        size = path.stat().st_size
        assert said["file"] == f"{size} bytes, {size / known.num_selected:.2f} a selected value"
        assert (said["weights before"], said["weights after"]) == (known.base_fingerprint, known.result_fingerprint)
        assert said["checksum"] == known.metadata["checksum"]
        assert ("how far values moved" in printed) == (previous == "yes")
