"""Methods, options, precisions and every DeepSpeed configuration, in short runs on two ranks."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.fine_tuning import EMBEDDING
from support.jobs import Results, result_of
from support.launches import CONFIGS, changed, mask_index, same_bits, same_mask, tree, weights
from support.stream_runs import NUM_RANKS, RATIO, Material
from transformers import AutoModelForCausalLM

from piece_ds.deltas import ChainFollower

TASK = "00-train"  # a single file's stem


def task_folder(material: Material, variants: Results, name: str) -> Path:
    result_of(variants, name)
    return material.out(name) / TASK


def num_selected(folder: Path) -> int:
    return sum(positions.numel() for positions in mask_index(folder / "mask.safetensors").values())


def assert_only_selected_moved(base: Path, folder: Path) -> None:
    index = mask_index(folder / "mask.safetensors")
    moved = changed(weights(base), weights(folder / "model"))
    assert moved, "nothing was trained"
    for name, positions in moved.items():
        assert torch.isin(positions, index.get(name, torch.zeros(0, dtype=torch.int64))).all(), name


@pytest.mark.slow
def test_the_next_task_is_judged_where_forward_transfer_is_asked_for(
    material: Material, slow_variants: Results
) -> None:
    """And a task whose scorer is "loss" is not generated for."""
    result_of(slow_variants, "ahead")
    matrix = json.loads((material.out("ahead") / "results.json").read_text())["matrix"]
    assert matrix["metrics"] == ["loss", "(BLEU-4 + ROUGE-L) / 2"]
    assert all(value is not None for row in matrix["loss"]["after"] for value in row)
    assert matrix["summary"]["loss_forward_transfer"] is not None
    assert matrix["score"]["after"][0][0] is None
    files = (material.out("ahead") / "predictions").rglob("*.jsonl")
    assert {path.stem for path in files} == {"text"}


@pytest.mark.slow
@pytest.mark.parametrize("config", [path.stem for path in sorted(CONFIGS.glob("*.json"))])
def test_every_configuration_trains_only_selected_weights(
    material: Material, slow_variants: Results, config: str
) -> None:
    assert_only_selected_moved(material.base, task_folder(material, slow_variants, config))


@pytest.mark.slow
@pytest.mark.parametrize("config", [path.stem for path in sorted(CONFIGS.glob("*.json")) if path.stem != "zero3"])
def test_every_configuration_gives_what_zero3_gives(material: Material, slow_variants: Results, config: str) -> None:
    """Masks may differ at the threshold by rounding; two AdamW steps then agree wherever both selected."""
    expected, found = (task_folder(material, slow_variants, name) for name in ("zero3", config))
    masks = [mask_index(folder / "mask.safetensors") for folder in (expected, found)]
    base, first, second = weights(material.base), weights(expected / "model"), weights(found / "model")
    pairs = [{(n, p) for n, positions in mask.items() for p in positions.tolist()} for mask in masks]
    assert len(pairs[0] ^ pairs[1]) <= 0.02 * len(pairs[0])
    largest = max(float((first[name] - base[name]).abs().max()) for name in base)
    apart = [abs(float(first[n].view(-1)[p] - second[n].view(-1)[p])) for n, p in pairs[0] & pairs[1]]
    assert max(apart) <= 0.05 * largest


@pytest.mark.slow
@pytest.mark.parametrize("method", ["piece-f", "random", "magnitude"])
def test_methods_select_k_and_train_only_that(material: Material, slow_variants: Results, method: str) -> None:
    folder = task_folder(material, slow_variants, method)
    assert_only_selected_moved(material.base, folder)
    assert num_selected(folder) == int(RATIO * sum(t.numel() for t in weights(material.base).values()))
    assert EMBEDDING not in mask_index(folder / "mask.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["layer", "tensor"])
def test_budgets_share_out_exactly_k(material: Material, slow_variants: Results, budget: str) -> None:
    folder = task_folder(material, slow_variants, budget)
    assert_only_selected_moved(material.base, folder)
    assert num_selected(folder) == int(RATIO * sum(t.numel() for t in weights(material.base).values()))


@pytest.mark.slow
def test_magnitude_selects_the_largest_weights(material: Material, slow_variants: Results) -> None:
    index = mask_index(task_folder(material, slow_variants, "magnitude") / "mask.safetensors")
    base = {name: tensor for name, tensor in weights(material.base).items() if name != EMBEDDING}
    k = sum(positions.numel() for positions in index.values())
    threshold = torch.cat([tensor.abs().view(-1) for tensor in base.values()]).sort(descending=True).values[k - 1]
    assert all(bool((base[name].abs().view(-1)[positions] >= threshold).all()) for name, positions in index.items())


@pytest.mark.slow
def test_methods_select_differently(material: Material, slow_variants: Results) -> None:
    names = ("piece-s", "piece-f", "random", "magnitude", "layer", "tensor")
    folders = [task_folder(material, slow_variants, name) for name in names]
    assert not any(same_mask(first, second) for first, second in itertools.combinations(folders, 2))


@pytest.mark.slow
def test_tensor_budget_gives_every_tensor_its_share(material: Material, slow_variants: Results) -> None:
    index = mask_index(task_folder(material, slow_variants, "tensor") / "mask.safetensors")
    base = weights(material.base)
    assert index.keys() == base.keys() - {EMBEDDING}
    shares = [positions.numel() / base[name].numel() for name, positions in index.items() if base[name].numel() > 500]
    assert max(shares) - min(shares) < 0.01


def test_seqft_trains_everything_it_is_given_and_writes_no_mask(material: Material, variants: Results) -> None:
    folder = task_folder(material, variants, "seqft")
    assert not {"mask.safetensors", "delta.safetensors"} & tree(folder)
    moved = changed(weights(material.base), weights(folder / "model"))
    assert moved.keys() >= weights(material.base).keys() - {EMBEDDING}
    results = json.loads((material.out("seqft") / "results.json").read_text())
    assert (results["method"], results["ratio"], results["finished"]) == ("seqft", 1.0, 1)


def test_given_mask_is_used_as_it_is_even_on_the_embedding(material: Material, variants: Results) -> None:
    folder = task_folder(material, variants, "given")
    given = mask_index(material.root / "given.safetensors")
    used = mask_index(folder / "mask.safetensors")
    assert used.keys() == given.keys()
    assert all(torch.equal(used[name], given[name]) for name in given)
    assert_only_selected_moved(material.base, folder)
    assert EMBEDDING in changed(weights(material.base), weights(folder / "model"))


def test_saved_statistics_are_used_instead_of_a_second_pass(material: Material, variants: Results) -> None:
    """By another method than the one that took them; the mask is that of a pass of its own."""
    folders = [task_folder(material, variants, f"statistics-{name}") for name in ("write", "read", "other")]
    written, read, other = folders
    assert same_mask(read, other)
    assert not same_mask(read, written)
    files = tree(material.root / "statistics")
    shards = {f"train/statistics-{rank:05d}-of-{NUM_RANKS:05d}.safetensors" for rank in range(NUM_RANKS)}
    assert files == {"train/statistics.json", *shards}


@pytest.mark.slow
def test_saved_statistics_serve_another_method_and_ratio(material: Material, slow_variants: Results) -> None:
    total = sum(tensor.numel() for tensor in weights(material.base).values())
    assert num_selected(task_folder(material, slow_variants, "statistics-ratio")) == int(0.01 * total)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "kept"), [("save-last", ["01-text"]), ("save-never", []), ("save-each", ["00-letter", "01-text"])]
)
def test_save_model_keeps_the_models_it_says(
    material: Material, slow_variants: Results, mode: str, kept: list[str]
) -> None:
    result_of(slow_variants, mode)
    assert sorted(path.parent.name for path in material.out(mode).glob("*/model")) == kept
    assert len(list(material.out(mode).glob("*/delta.safetensors"))) == 2


def test_bf16_files_are_trained_in_bf16_and_stay_bf16(material: Material, variants: Results) -> None:
    folder = task_folder(material, variants, "bf16")
    assert {tensor.dtype for tensor in weights(folder / "model").values()} == {torch.bfloat16}
    assert_only_selected_moved(material.root / "base_bf16", folder)
    delta = load_file(folder / "delta.safetensors")
    assert {v.dtype for n, v in delta.items() if not n.endswith(".indices")} == {torch.bfloat16}
    assert json.loads((material.out("bf16") / "run.json").read_text())["TrainingArguments"]["bf16"] is True


@pytest.mark.parametrize("name", ["bf16", "masked"])
def test_a_copy_follows_the_chain_of_deltas(material: Material, variants: Results, name: str) -> None:
    folder = task_folder(material, variants, name)
    model = AutoModelForCausalLM.from_pretrained(material.root / "base_bf16" if name == "bf16" else material.base)
    assert ChainFollower(model, folder).apply_new()
    trained = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert same_bits(dict(model.named_parameters()), dict(trained.named_parameters()))


def test_a_delta_is_coded_as_asked(material: Material, variants: Results) -> None:
    for name, is_plain in (("words", True), ("masked", False)):
        with safe_open(task_folder(material, variants, name) / "delta.safetensors", "pt") as file:
            assert (file.metadata()["version"] == "1") == is_plain


def test_rows_of_token_ids_are_used_as_they_are(material: Material, variants: Results) -> None:
    words, tokens = task_folder(material, variants, "words"), task_folder(material, variants, "tokens")
    assert same_mask(words, tokens)
    assert same_bits(weights(words / "model"), weights(tokens / "model"))


def test_update_modes_select_the_same_weights_and_train_them_alike(material: Material, variants: Results) -> None:
    """Sums in another order: a step of AdamW differs by rounding."""
    compact, masked = task_folder(material, variants, "words"), task_folder(material, variants, "masked")
    assert same_mask(compact, masked)
    assert_only_selected_moved(material.base, masked)
    base, first, second = weights(material.base), weights(compact / "model"), weights(masked / "model")
    largest = max(float((first[name] - base[name]).abs().max()) for name in base)
    assert max(float((first[name] - second[name]).abs().max()) for name in base) <= 1e-3 * largest


@pytest.mark.slow
def test_evaluation_during_training_uses_the_eval_file(material: Material, slow_variants: Results) -> None:
    folder = task_folder(material, slow_variants, "evaluated")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "eval_loss" in row] == [1, 2]


@pytest.mark.slow
def test_smaller_last_step_is_taken_where_it_is_accepted(material: Material, slow_variants: Results) -> None:
    """32 rows: 8 micro-batches on each of 2 ranks, accumulated 3, 3 and 2 at a time."""
    folder = task_folder(material, slow_variants, "smaller-step")
    assert_only_selected_moved(material.base, folder)
    results = json.loads((material.out("smaller-step") / "results.json").read_text())
    assert [cost["num_steps"] for cost in results["cost"].values()] == [3]


def test_delta_metadata_names_its_format(material: Material, variants: Results) -> None:
    with safe_open(task_folder(material, variants, "words") / "delta.safetensors", framework="pt") as file:
        assert (file.metadata()["format"], file.metadata()["version"]) == ("piece-delta", "1")
