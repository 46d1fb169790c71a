"""PEFT loads deltas as adapters of our own tuner: any parameter, several at once, and every switch exact to the bit."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.deltas import make_run
from support.ranks import on_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from piece_ds import register_peft_tuner
from piece_ds.__main__ import main
from piece_ds.state.weights_hash import bits_of

pytestmark = pytest.mark.heavy

IDS = torch.arange(40).view(2, 20)
NAMES = ("law", "support", "forms")


def delta(*arguments: object) -> None:
    main(["delta", *map(str, arguments)])


def loaded(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: bits_of(param.detach()).clone() for name, param in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# What may change in each family: everything is a Linear weight, a norm, a bias, a tied or untied embedding, an expert.
FAMILIES = {"llama": None, "qwen3": lambda name: True, "neox": lambda name: True, "mixtral": lambda name: True}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_give_the_bits_of_delta_apply_in_any_order_of_switches(tmp_path: Path, family: str) -> None:
    """In bf16, and three tasks in a row, whose weights overlap: the oracle is the folder that delta apply writes."""
    register_peft_tuner()
    run = make_run(tmp_path, family, select=FAMILIES[family])
    stages = [run.base]
    for number, file in enumerate(run.deltas):
        delta("export", file, "--format", "piece-peft", "--output", tmp_path / NAMES[number])
        delta("apply", run.base, *run.deltas[: number + 1], "--output", tmp_path / f"stage{number}")
        stages.append(tmp_path / f"stage{number}")
    logits = [loaded(folder)(input_ids=IDS).logits for folder in stages]
    assert all(not torch.equal(logits[0], other) for other in logits[1:])

    # One adapter, then all; the base's answers while they are disabled.
    model = PeftModel.from_pretrained(loaded(run.base), tmp_path / NAMES[0], adapter_name=NAMES[0]).eval()
    assert torch.equal(model(input_ids=IDS).logits, logits[1])
    for name in NAMES[1:]:
        model.load_adapter(tmp_path / name, adapter_name=name)
    for count in (3, 1, 2, 3):
        model.base_model.set_adapter(list(NAMES[:count]))
        assert torch.equal(model(input_ids=IDS).logits, logits[count])
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, logits[0])
    assert not any(param.requires_grad for param in model.parameters())

    # Merged, whatever is active, and unmerged.
    model.base_model.set_adapter(list(NAMES[:2]))
    model.merge_adapter()
    assert torch.equal(model(input_ids=IDS).logits, logits[2])
    model.unmerge_adapter()
    model.base_model.set_adapter(NAMES[0])
    assert torch.equal(model(input_ids=IDS).logits, logits[1])

    # Merged one after another, they stay applied in that order.
    model.merge_adapter([NAMES[0]])
    model.merge_adapter([NAMES[1]])
    assert torch.equal(model(input_ids=IDS).logits, logits[2])
    model.unmerge_adapter()

    # An adapter that is deleted leaves nothing; unloading gives the base's bytes.
    model.delete_adapter(NAMES[2])
    assert same(weights(model.unload()), weights(loaded(run.base)))


def test_merging_and_unloading_leaves_the_tasks_weights(tmp_path: Path) -> None:
    register_peft_tuner()
    run = make_run(tmp_path, "mixtral", select=lambda name: True)
    delta("export", run.deltas[0], "--format", "piece-peft", "--model", run.base, "--output", tmp_path / "law")
    delta("apply", run.base, run.deltas[0], "--output", tmp_path / "task")
    model = PeftModel.from_pretrained(loaded(run.base), tmp_path / "law")
    assert same(weights(model.merge_and_unload(safe_merge=True)), weights(loaded(tmp_path / "task")))


def test_what_peft_saves_it_loads(tmp_path: Path) -> None:
    """And its file has the export's tensors: nothing is cast, nothing of the base is added."""
    register_peft_tuner()
    run = make_run(tmp_path, "qwen3", select=lambda name: True)
    delta("export", run.deltas[0], "--format", "piece-peft", "--model", run.base, "--output", tmp_path / "law")
    model = PeftModel.from_pretrained(loaded(run.base), tmp_path / "law", adapter_name="any").eval()
    logits = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "saved")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("law", "saved/any"))
    assert same(first, second)
    assert all(first[name].dtype == second[name].dtype for name in first)
    again = PeftModel.from_pretrained(loaded(run.base), tmp_path / "saved" / "any").eval()
    assert torch.equal(again(input_ids=IDS).logits, logits)
    assert json.loads((tmp_path / "saved" / "any" / "adapter_config.json").read_text())["peft_type"] == "PIECE"


def test_another_base_or_order_is_refused_and_nothing_written(tmp_path: Path) -> None:
    register_peft_tuner()
    run = make_run(tmp_path)
    for name, file in zip(NAMES, run.deltas, strict=True):
        delta("export", file, "--format", "piece-peft", "--output", tmp_path / name)
    model = PeftModel.from_pretrained(loaded(run.base), tmp_path / "support")
    with pytest.raises(ValueError, match=r"adapter 'default' was made on other values of .* in the run's order"):
        model(input_ids=IDS)
    assert same(weights(model.unload()), weights(loaded(run.base)))


def test_a_base_in_another_dtype_gets_the_merged_models_values_in_it(tmp_path: Path) -> None:
    register_peft_tuner()
    run = make_run(tmp_path)
    delta("export", run.deltas[0], "--format", "piece-peft", "--output", tmp_path / "law")
    delta("apply", run.base, run.deltas[0], "--output", tmp_path / "task")
    model = PeftModel.from_pretrained(loaded(run.base).float(), tmp_path / "law")
    assert same(weights(model.merge_and_unload()), weights(loaded(tmp_path / "task").float()))


def test_a_model_whose_ranks_hold_parts_of_a_parameter_is_refused_and_left_alone(tmp_path: Path) -> None:
    """ZeRO-3 and DTensors (FSDP2), on two ranks; the refusal names what takes such models."""
    register_peft_tuner()
    run = make_run(tmp_path, "qwen3", select=lambda name: True)
    delta("export", run.deltas[0], "--format", "piece-peft", "--output", tmp_path / "law")

    def refused(model: nn.Module) -> tuple[str, bool]:
        before = [(name, id(module)) for name, module in model.named_modules()]
        with pytest.raises(ValueError, match="adapter 'law'") as caught:
            PeftModel.from_pretrained(model, tmp_path / "law", adapter_name="law")
        return str(caught.value), before == [(name, id(module)) for name, module in model.named_modules()]

    def work() -> list[tuple[str, bool]]:
        from deepspeed import zero

        split = loaded(run.base)
        zero.Init(module=split, config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}})
        sharded = loaded(run.base)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
        return [refused(split), refused(sharded)]

    for found in on_ranks(2, work):
        for message, alone in found:
            assert "is partitioned over ranks: use piece_ds.apply_delta_" in message
            assert "\n" not in message
            assert alone


def test_what_no_adapter_can_hold_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "gpt-oss", select=lambda name: "sinks" in name or "q_proj.weight" in name, density=0.3)
    bare = make_run(tmp_path / "bare", with_previous=False)
    for file, message in ((run.deltas[0], "itself and one of a module in it"), (bare.deltas[0], "no previous values")):
        with pytest.raises(SystemExit) as stopped:
            delta("export", file, "--format", "piece-peft", "--output", tmp_path / "law")
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "law").exists()
