"""Deltas of a model whose experts transformers stacks go on and off the published files, which hold them apart."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.causal_classes import model_types, tiny_model
from support.deltas import Run, make_run, sha256_of
from support.models import make_model
from support.moe import STACKED, is_router
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from piece_ds.__main__ import main
from piece_ds.models.stored_names import Part, stored_names

pytestmark = pytest.mark.heavy


def delta(*arguments: object) -> None:
    main(["delta", *map(str, arguments)])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        delta(*arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.fixture(scope="module", params=STACKED)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Shards of 20 kB: the experts of a layer lie in several files."""
    return make_run(
        tmp_path_factory.mktemp(request.param),
        request.param,
        sharded=True,
        select=lambda name: "embed" not in name and not is_router(name),
    )


def test_parts_are_those_of_transformers_own_conversion() -> None:
    """Element by element, in both directions, on a model in memory and on the meta device."""
    for family in STACKED:
        model = make_model(family)
        names = stored_names(model)
        with torch.device("meta"):
            assert stored_names(AutoModelForCausalLM.from_config(model.config)) == names
        params = {name: param.detach().reshape(-1) for name, param in model.named_parameters()}
        stored = revert_weight_conversion(model, dict(model.state_dict()))
        for name, part in names.parts.items():
            whole, tensor = params[part.parameter], stored[name]
            assert torch.equal(part.of(whole), tensor)
            assert torch.equal(whole[part.positions(0, tensor.numel())], tensor.reshape(-1))
            places, positions = part.locate(torch.arange(whole.numel()))
            assert places.numel() == tensor.numel()
            assert torch.equal(whole[places], tensor.reshape(-1)[positions])
        buffers = {name for name in stored if "e_score_correction_bias" in name}
        assert set(stored) == set(names.whole) & set(stored) | set(names.parts) | buffers
        assert bool(names.parts) == (family != "gpt-oss")  # whose files are stacked too


# What their conversions put together in another way than a view cuts apart: rows interleaved, projections side by side.
NO_VIEWS = {"inkling2_text", "hrm_text"}


@pytest.mark.slow
def test_every_causal_class_is_held_whole_or_in_parts() -> None:
    """As transformers' own conversion has them; all but a few classes, which cannot be made tiny, are tried."""
    with_parts, num_tried, not_built = 0, 0, {}
    for model_type in model_types():
        try:
            model = tiny_model(model_type)
        except Exception as error:
            not_built[model_type] = f"{type(error).__name__}: {str(error)[:80]}"
            continue
        num_tried += 1
        names, stored = stored_names(model), revert_weight_conversion(model, dict(model.state_dict()))
        params = {name: param.detach().reshape(-1) for name, param in model.named_parameters()}
        held = dict.fromkeys(params, 0)
        for name, tensor in stored.items():
            if name in names.parts:
                part = names.parts[name]
                assert torch.equal(part.of(params[part.parameter]), tensor), (model_type, name)
                held[part.parameter] += tensor.numel()
            elif name in names.whole:
                assert torch.equal(params[names.whole[name]], tensor.reshape(-1)), (model_type, name)
                held[names.whole[name]] = tensor.numel()
        with_parts += bool(names.parts)
        missing = [name for name, whole in params.items() if held[name] != whole.numel()]
        assert bool(missing) == (model_type in NO_VIEWS), (model_type, missing)
    assert with_parts > 30
    assert num_tried > 5 * len(not_built), not_built


def test_any_view_of_a_parameter_can_be_a_part() -> None:
    whole = torch.arange(4 * 6 * 10.0).view(4, 6, 10)
    for view in (whole[1].t(), whole[2, 3:], whole[2, :, 2:7], whole[:, 1], whole[1, 2:5, 3:4].t(), whole[3, ::2]):
        part = Part("w", tuple(view.shape), view.storage_offset(), view.stride())
        places, positions = part.locate(torch.arange(whole.numel()))
        assert torch.equal(whole.view(-1)[places], view.reshape(-1)[positions])
        assert places.numel() == view.numel()
        assert torch.equal(whole.view(-1)[part.positions(3, view.numel())], view.reshape(-1)[3:])
        assert not part.is_run or torch.equal(whole.view(-1)[part.offset :][: view.numel()], view.reshape(-1))


def test_a_stack_goes_on_and_off_to_the_byte(run: Run, tmp_path: Path) -> None:
    names = weights(run.base)
    assert any(".experts.3." in name for name in names) or "gpt-oss" in str(run.base)
    delta("apply", run.base, run.folder, "--output", tmp_path / "applied")
    assert same(weights(tmp_path / "applied"), weights(run.final))
    assert not same(weights(run.base), weights(run.final))
    delta("revert", tmp_path / "applied", run.folder, "--in_place")
    assert sha256_of(tmp_path / "applied") == sha256_of(run.base)


def test_a_folder_that_holds_experts_stacked_takes_the_same_deltas(run: Run, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.base, dtype="auto")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert not any(".experts.3." in name for name in weights(tmp_path / "stacked"))
    delta("apply", tmp_path / "stacked", run.folder, "--in_place")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "stacked", dtype="auto")
    expected = AutoModelForCausalLM.from_pretrained(run.final, dtype="auto")
    assert same(found.state_dict(), expected.state_dict())


def test_a_merge_is_a_plain_folder_that_transformers_loads(run: Run, tmp_path: Path) -> None:
    delta("merge", run.base, run.deltas[0], "--output", tmp_path / "merged")
    delta("apply", tmp_path / "merged", *run.deltas[1:], "--output", tmp_path / "rest")
    assert same(weights(tmp_path / "rest"), weights(run.final))
    assert not (tmp_path / "merged" / "piece_ds.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_a_diff_of_two_folders_leads_from_one_to_the_other(run: Run, tmp_path: Path) -> None:
    delta("diff", run.base, run.final, "--output", tmp_path / "diff.safetensors")
    delta("apply", run.base, tmp_path / "diff.safetensors", "--output", tmp_path / "there")
    assert same(weights(tmp_path / "there"), weights(run.final))


def test_a_patch_for_vllm_has_the_names_and_shapes_of_the_files(run: Run, tmp_path: Path) -> None:
    delta("apply", run.base, run.deltas[0], "--output", tmp_path / "task")
    delta("export", run.deltas[0], "--format", "vllm", "--model", run.base, "--output", tmp_path / "patch.safetensors")
    found = weights(run.base)
    with safe_open(tmp_path / "patch.safetensors", framework="pt") as file:
        for name, shape in json.loads(file.metadata()["full_shapes"]).items():
            index = file.get_tensor(f"{name}.indices")
            assert list(found[name].shape) == shape
            assert index.dtype == torch.int32
            assert bool((index.diff() > 0).all())
            found[name].view(-1)[index.long()] = file.get_tensor(f"{name}.values")
    assert same(found, weights(tmp_path / "task"))


def test_folders_without_an_expert_or_with_one_twice_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "mixtral")
    path, part = run.base / "model.safetensors", "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != part}, path, {"format": "pt"})
    error = refused(capsys, "apply", run.base, run.deltas[0], "--output", tmp_path / "x")
    assert "'model.layers.1.mlp.experts.gate_up_proj' for one" in error
    whole = "model.layers.1.mlp.experts.gate_up_proj"
    save_file(tensors | {whole: torch.zeros(5, 32, 24, dtype=torch.bfloat16)}, path, {"format": "pt"})
    assert "whole, as" in refused(capsys, "apply", run.base, run.deltas[0], "--output", tmp_path / "x")
    save_file(tensors | {part: tensors[part].t().contiguous()}, path, {"format": "pt"})
    assert "has shape [24, 16]" in refused(capsys, "apply", run.base, run.deltas[0], "--output", tmp_path / "x")
