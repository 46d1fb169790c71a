"""A stream of two tasks, launched as a user does: every file is what it should be, against plain PyTorch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.fine_tuning import EMBEDDING, mean_loss, read_model, read_rows, select_piece_s, train_masked
from support.jobs import Results, result_of
from support.launches import changed, mask_index, same_bits, same_mask, tree, weights
from support.stream_runs import (
    ACCUMULATION,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    NUM_STEPS,
    RATIO,
    ROWS_PER_STEP,
    WEIGHT_DECAY,
    Material,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from piece_ds.__main__ import main
from piece_ds.deltas import ChainFollower, open_delta
from piece_ds.evaluation.predictions import rescore

FOLDERS = {"letter": "00-letter", "text": "01-text"}
TASK_FILES = {"mask.safetensors", "delta.safetensors", "metrics.jsonl", "SHA256SUMS"}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def base_of(material: Material, stream: Path, task: str) -> Path:
    """The model folder that a task began with."""
    return material.base if task == "letter" else stream / "00-letter" / "model"


def test_stream_writes_exactly_the_files_of_the_contract(stream: Path) -> None:
    figures = {path for path in tree(stream) if path.startswith("figures/")}
    expected = {"run.json", "results.json", "report.html", "stdout.txt"}
    for folder in FOLDERS.values():
        expected |= {f"{folder}/{name}" for name in TASK_FILES}
        expected |= {f"{folder}/model/{name}" for name in MODEL_FILES}
    moments = {"before": FOLDERS, "00-letter": ["letter"], "01-text": FOLDERS}
    expected |= {f"predictions/{moment}/{task}.jsonl" for moment, tasks in moments.items() for task in tasks}
    assert tree(stream) - figures == expected
    assert figures


def test_every_task_moves_the_model_further_from_the_base_on_what_it_was_taught(stream: Path) -> None:
    found = results_of(stream)["divergence"]
    assert {moment: set(of_text) for moment, of_text in found.items()} == {
        "after letter": {"letter", "general text"},
        "after text": {"letter", "text", "general text"},
    }
    assert all(kl > 0 for of_text in found.values() for kl in of_text.values())


@pytest.mark.parametrize("task", FOLDERS)
def test_saved_model_and_tokenizer_load_and_generate(stream: Path, task: str) -> None:
    folder = stream / FOLDERS[task] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    prompt = tokenizer("abc=", return_tensors="pt", add_special_tokens=False)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > 4


@pytest.mark.parametrize("task", FOLDERS)
def test_mask_selects_exactly_k_and_never_the_embedding(material: Material, stream: Path, task: str) -> None:
    path = stream / FOLDERS[task] / "mask.safetensors"
    index = mask_index(path)
    base = weights(material.base)
    total = sum(tensor.numel() for tensor in base.values())
    assert sum(positions.numel() for positions in index.values()) == int(RATIO * total)
    assert EMBEDDING not in index
    assert all(int(positions[-1]) < base[name].numel() for name, positions in index.items())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["method"]) == ("piece-mask", "1", "piece-s")
    assert (int(metadata["selected"]), int(metadata["total"])) == (int(RATIO * total), total)
    assert json.loads(metadata["shapes"]) == {name: list(base[name].shape) for name in index}


@pytest.mark.parametrize("task", FOLDERS)
def test_mask_is_that_of_a_plain_pytorch_oracle(material: Material, stream: Path, task: str) -> None:
    """Two ranks against one process; where sums round apart, 1 % of k may differ at the threshold."""
    folder = base_of(material, stream, task)
    rows = read_rows(material.tasks / task / "train.json", folder)
    expected = select_piece_s(folder, rows, RATIO, batch_size=4)
    index = mask_index(stream / FOLDERS[task] / "mask.safetensors")
    found = {(name, position) for name, positions in index.items() for position in positions.tolist()}
    assert len(found) == len(expected)
    assert len(found - expected) <= 0.01 * len(expected)


@pytest.mark.parametrize("task", FOLDERS)
def test_only_selected_weights_moved(material: Material, stream: Path, task: str) -> None:
    before, after = weights(base_of(material, stream, task)), weights(stream / FOLDERS[task] / "model")
    moved, index = changed(before, after), mask_index(stream / FOLDERS[task] / "mask.safetensors")
    for name, positions in moved.items():
        assert torch.isin(positions, index[name]).all(), name
    num_moved = sum(positions.numel() for positions in moved.values())
    assert num_moved > 0.9 * sum(positions.numel() for positions in index.values())


def test_base_and_deltas_in_order_are_the_final_model_and_revert_to_the_base(material: Material, stream: Path) -> None:
    base = weights(material.base)
    current = {name: tensor.clone() for name, tensor in base.items()}
    deltas = [load_file(stream / folder / "delta.safetensors") for folder in FOLDERS.values()]
    for delta, folder in zip(deltas, FOLDERS.values(), strict=True):
        index = mask_index(stream / folder / "mask.safetensors")
        assert delta.keys() == {f"{name}.{part}" for name in index for part in ("indices", "values", "previous")}
        for name, positions in index.items():
            assert delta[f"{name}.indices"].dtype == torch.int32
            assert torch.equal(delta[f"{name}.indices"].long(), positions)
            assert torch.equal(delta[f"{name}.previous"], current[name].view(-1)[positions])
            current[name].view(-1)[positions] = delta[f"{name}.values"]
        assert same_bits(current, weights(stream / folder / "model"))
    for delta in reversed(deltas):
        for name in base:
            if f"{name}.indices" in delta:
                current[name].view(-1)[delta[f"{name}.indices"].long()] = delta[f"{name}.previous"]
    assert same_bits(current, base)


def test_delta_commands_take_the_base_to_the_final_model_and_back(
    material: Material, stream: Path, tmp_path: Path
) -> None:
    """The fingerprints that two ranks of ZeRO-3 wrote are those of the files."""
    main(["delta", "apply", str(material.base), str(stream), "--output", str(tmp_path / "out")])
    assert same_bits(weights(tmp_path / "out"), weights(stream / "01-text" / "model"))
    main(["delta", "revert", str(tmp_path / "out"), str(stream), "--output", str(tmp_path / "back")])
    sha256 = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for folder in (material.base, tmp_path / "back")
    ]
    assert sha256[0] == sha256[1]


@pytest.fixture(scope="session", params=FOLDERS)
def trained(request: pytest.FixtureRequest, material: Material, stream: Path) -> tuple[str, Path, Any]:
    """(task, what it began with, the oracle's training with the task's mask)."""
    folder = base_of(material, stream, request.param)
    rows = read_rows(material.tasks / request.param / "train.json", folder)
    index = mask_index(stream / FOLDERS[request.param] / "mask.safetensors")
    oracle = train_masked(folder, rows, index, ROWS_PER_STEP, NUM_STEPS, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM)
    return request.param, folder, oracle


def test_four_accumulated_clipped_decayed_steps_equal_plain_adamw(trained: tuple[str, Path, Any], stream: Path) -> None:
    """Each task has a fresh optimizer: the oracle of the second begins at the first one's model."""
    task, folder, oracle = trained
    before, after = weights(folder), weights(stream / FOLDERS[task] / "model")
    largest = max(float((oracle.weights[name] - before[name]).abs().max()) for name in before)
    worst = max(float((oracle.weights[name] - after[name]).abs().max()) for name in before)
    assert largest > LEARNING_RATE
    assert worst <= 0.05 * largest, f"{worst / largest:.2%} of the largest update"


def test_logged_gradient_norm_is_that_of_the_masked_gradient(trained: tuple[str, Path, Any], stream: Path) -> None:
    task, _, oracle = trained
    lines = (stream / FOLDERS[task] / "metrics.jsonl").read_text().splitlines()
    norms = [row["grad_norm"] for row in map(json.loads, lines) if "grad_norm" in row]
    assert norms == pytest.approx(oracle.norms, rel=0.01)
    assert min(norms) > MAX_GRAD_NORM


def test_metrics_tell_every_step_and_every_phase(trained: tuple[str, Path, Any], stream: Path) -> None:
    lines = (stream / FOLDERS[trained[0]] / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, NUM_STEPS + 1))
    known = {"grad_norm", "learning_rate", "tokens_per_second", "train_seconds", "host_peak_bytes"}
    assert all(known <= row.keys() and row["tokens_per_second"] > 0 for row in steps)
    events = {row["event"]: row for row in rows if "event" in row}
    assert {"selection", "training", "saving", "evaluation after"} <= events.keys()
    assert events["selection"]["statistics_seconds"] > 0
    assert events["selection"]["selection_seconds"] > 0
    assert all(events[name]["seconds"] > 0 for name in ("training", "saving", "evaluation after"))


def test_result_matrix_is_complete(stream: Path) -> None:
    results = results_of(stream)
    assert results["finished"] == 2
    matrix = results["matrix"]
    assert matrix["tasks"] == ["letter", "text"]
    _assert_lower_triangle(matrix["loss"])
    assert len(matrix["accuracy"]["after"]) == 2
    assert all(row[0] is not None for row in matrix["accuracy"]["after"])
    assert None not in [matrix["general_loss"]["before"], *matrix["general_loss"]["after"]]
    assert results["masks"].keys() == results["cost"].keys() == results["logs"].keys() == set(FOLDERS)
    overlaps = torch.tensor(results["overlaps"])
    assert torch.equal(overlaps, overlaps.T)
    assert overlaps.diagonal().tolist() == [1.0, 1.0]
    assert all(cost["num_steps"] == NUM_STEPS for cost in results["cost"].values())


def test_what_was_written_gives_the_scores_again(stream: Path) -> None:
    """At every moment, for every task seen: a letter task has an accuracy, a text task BLEU and ROUGE too."""
    results = results_of(stream)
    matrix = results["matrix"]
    assert matrix["metrics"] == ["accuracy", "(BLEU-4 + ROUGE-L) / 2"]
    for moment, row in zip(
        ["before", *FOLDERS.values()], [matrix["score"]["before"], *matrix["score"]["after"]], strict=True
    ):
        files = {path.stem: path for path in (stream / "predictions" / moment).iterdir()}
        assert {task: rescore(path)["score"] for task, path in files.items()} == {
            task: value for task, value in zip(FOLDERS, row, strict=True) if value is not None
        }
    assert list(results["measures"]["after text"]["text"]) == ["bleu_4", "rouge_l"]
    assert results["cost"]["text"]["generated_tokens_per_second"] > 0


def _assert_lower_triangle(table: dict[str, Any]) -> None:
    assert None not in table["before"]
    for task, row in enumerate(table["after"]):
        assert None not in row[: task + 1]
        assert all(value is None for value in row[task + 1 :])


def test_recorded_losses_are_those_of_the_saved_models(material: Material, stream: Path) -> None:
    table = results_of(stream)["matrix"]["loss"]
    folders = [material.base, *(stream / name / "model" for name in FOLDERS.values())]
    for row, folder in zip([table["before"], *table["after"]], folders, strict=True):
        model = read_model(folder).eval()
        for task, value in zip(FOLDERS, row, strict=True):
            if value is not None:
                rows = read_rows(material.tasks / task / "test.json", folder)
                assert value == pytest.approx(mean_loss(model, rows).item(), rel=1e-4)


def test_mask_statistics_count_every_selected_weight(stream: Path) -> None:
    for task, counts in results_of(stream)["masks"].items():
        cells = [cell for modules in counts.values() for cell in modules.values()]
        index = mask_index(stream / FOLDERS[task] / "mask.safetensors")
        assert sum(cell["selected"] for cell in cells) == sum(positions.numel() for positions in index.values())


def test_run_file_says_what_was_run(material: Material, stream: Path) -> None:
    run = json.loads((stream / "run.json").read_text())
    assert run["ModelArguments"]["model_name_or_path"] == str(material.base)
    assert run["MethodArguments"]["mask_ratio"] == RATIO
    assert run["all_training_arguments"]["gradient_accumulation_steps"] == ACCUMULATION
    assert run["TrainingArguments"]["gradient_accumulation_steps * ranks"] == ACCUMULATION * 2
    assert (run["TrainingArguments"]["seed"], run["world_size"]) == (42, 2)
    assert {"torch", "deepspeed", "transformers", "piece_ds", "python"} <= run["versions"].keys()


def test_report_shows_figures_that_exist_and_the_table_is_printed(stream: Path) -> None:
    report = (stream / "report.html").read_text()
    sources = [source for source in re.findall(r'src="([^"]+)"', report) if not source.startswith("data:")]
    assert all((stream / source).is_file() for source in sources)
    assert "letter" in report
    printed = (stream / "stdout.txt").read_text()
    assert "after text" in printed
    assert printed.count("report:") == 1  # one rank prints


def test_costs_are_those_of_the_files(stream: Path) -> None:
    for task, cost in results_of(stream)["cost"].items():
        folder = stream / FOLDERS[task]
        assert cost["mask_bytes"] == (folder / "mask.safetensors").stat().st_size
        assert cost["delta_bytes"] == (folder / "delta.safetensors").stat().st_size
        assert cost["model_bytes"] == sum(path.stat().st_size for path in (folder / "model").iterdir())
        assert cost["save_seconds"] > 0


def test_a_reporter_sees_one_run_of_all_tasks(material: Material, variants: Results) -> None:
    result_of(variants, "again")
    rows = [json.loads(line) for line in (material.out("again") / "recorded.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows if row["event"] != "log"] == ["begin", "end"]
    assert [row["step"] for row in rows if "loss" in row] == [*range(1, 2 * NUM_STEPS + 1)]
    matrix = results_of(material.out("again"))["matrix"]
    reported = [(row["step"], row["eval_stream/general_loss"]) for row in rows if "eval_stream/general_loss" in row]
    general = [matrix["general_loss"]["before"], *matrix["general_loss"]["after"]]
    assert reported == list(zip((0, NUM_STEPS, 2 * NUM_STEPS), general, strict=True))
    assert rows[-2]["eval_tasks/00-letter/score"] == matrix["score"]["after"][-1][0]


def test_a_copy_that_follows_the_chain_of_deltas_ends_with_the_trained_bits(
    material: Material, variants: Results
) -> None:
    """Over both tasks, at ZeRO-3 in compact mode; a second look finds nothing new."""
    result_of(variants, "again")
    run = material.out("again")
    model = AutoModelForCausalLM.from_pretrained(material.base)
    follower = ChainFollower(model, run)
    links = follower.apply_new()
    assert [(link.path.parent.parent.name, link.step) for link in links] == [
        (folder, step) for folder in FOLDERS.values() for step in (3, NUM_STEPS)
    ]
    trained = AutoModelForCausalLM.from_pretrained(run / "01-text" / "model")
    assert same_bits(dict(model.named_parameters()), dict(trained.named_parameters()))
    assert follower.apply_new() == []
    # The tasks' own deltas say what they follow on as well.
    first, second = (open_delta(run / folder / "delta.safetensors").metadata for folder in FOLDERS.values())
    assert (first["parent"], second["parent"]) == ("", first["checksum"])
    assert (first["step"], first["link"], second["link"]) == (str(NUM_STEPS), "0", "1")
    assert (links[0].base, links[1].result) == (first["base_fingerprint"], first["result_fingerprint"])


def test_the_same_command_gives_the_same_bits(material: Material, stream: Path, variants: Results) -> None:
    result_of(variants, "again")
    again = material.out("again")
    for folder in FOLDERS.values():
        assert same_mask(stream / folder, again / folder)
        assert same_bits(weights(stream / folder / "model"), weights(again / folder / "model"))
        first, second = (load_file(root / folder / "delta.safetensors") for root in (stream, again))
        assert all(torch.equal(first[name], second[name]) for name in first.keys() | second.keys())
    assert results_of(again)["matrix"] == results_of(stream)["matrix"]
