"""Bad input: one clear line, exit code 2, no traceback, nothing written; the same on every rank."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import run_job
from support.launches import CONFIGS, error_lines, launch, make_model_folder, make_rows, make_tasks, tree, write_rows
from transformers import AutoModelForCausalLM

from piece_ds.checkpoint.mask_file import save_mask
from piece_ds.models.layout import layout_of
from piece_ds.state.mask import Mask

GOOD_ROW = {"prompt": "one", "answer": "two"}


@dataclass(frozen=True)
class Case:
    """A command line that must be refused.

    Attributes:
        flags: what is wrong, after flags that are right; {base} stands for the folder of make_material().
        message: pattern of the whole message.
        script: train, select or eval.
    """

    flags: str
    message: str
    script: str = "train"


CASES = {
    "missing-file": Case("--train_file {base}/rows.jsonl", r"rows\.jsonl: no such file\. Did you mean 'row.json'\?"),
    "missing-folder": Case("--train_file {base}/none/x.json", r"x\.json: no such file, and no folder .*none"),
    "empty-file": Case("--train_file {base}/empty.json", r"empty\.json is empty"),
    "no-rows": Case("--train_file {base}/norows.json", r"norows\.json has no rows"),
    "malformed-json": Case("--train_file {base}/broken.json", r"broken\.json.*line 2"),
    "malformed-jsonl": Case("--train_file {base}/broken.jsonl", r"broken\.jsonl.*line 3"),
    "row-without-answer": Case("--train_file {base}/keys.jsonl", r"keys\.jsonl row 2: no 'answer'"),
    "empty-answer": Case("--train_file {base}/blank.jsonl", r"blank\.jsonl row 2: answer is empty"),
    "no-answer-token-left": Case("--train_file {base}/masked.jsonl", r"masked\.jsonl row 1: no label other than -100"),
    "eval-file-missing": Case("--eval_file {base}/gone.json", r"gone\.json: no such file"),
    "general-file-missing": Case("--general_file {base}/gone.txt", r"gone\.txt: no such file"),
    "scorer-unknown": Case("--scorers letter=leter", r"--scorers: 'leter' is unknown.*Did you mean 'letter'\?"),
    "scorer-of-no-task": Case("--scorers lettre=word", r"--scorers: no task 'lettre'; tasks are "),
    "scoring-unknown": Case("--scoring author", r"--scoring 'author' is unknown.*Did you mean 'authors'\?"),
    "harness-without-tasks": Case("--lm_eval_limit 3", r"--lm_eval_path and --lm_eval_limit belong to --lm_eval_tasks"),
    "harness-folder-missing": Case("--lm_eval_tasks x --lm_eval_path {base}/gone", r"gone: no such folder"),
    "ratio-0": Case("--mask_ratio 0", r"--mask_ratio must be in \(0, 1\], got 0\.0"),
    "ratio-1.5": Case("--mask_ratio 1.5", r"--mask_ratio must be in \(0, 1\], got 1\.5"),
    "ratio-negative": Case("--mask_ratio=-0.1", r"--mask_ratio must be in \(0, 1\], got -0\.1"),
    "ratio-nan": Case("--mask_ratio nan", r"--mask_ratio must be in \(0, 1\], got nan"),
    "mask-missing": Case("--mask_file {base}/gone.safetensors", r"gone\.safetensors: no such file"),
    "mask-of-another-model": Case(
        "--mask_file {base}/deep.safetensors",
        r"'model\.layers\.2\..*', which this"
        r" model does not have: it is a mask of another model",
    ),
    "mask-of-another-shape": Case("--mask_file {base}/wide.safetensors", r"shape \[.*this model's is \[.*mask"),
    "mask-truncated": Case("--mask_file {base}/truncated.safetensors", r"truncated or damaged"),
    "mask-flipped-bit": Case("--mask_file {base}/flipped.safetensors", r"checksum does not match"),
    "mask-is-no-mask": Case("--mask_file {base}/model/model.safetensors", r"expected 'piece-mask' version '1'"),
    "mask-with-seqft": Case("--mask_file {base}/mask.safetensors --method seqft", r"no meaning with --method seqft"),
    "mask-with-lora": Case("--mask_file {base}/mask.safetensors --method lora", r"no meaning with --method lora"),
    "ratio-without-text": Case("--method piece-ratio", r"needs text .*--general_text self"),
    "share-of-nothing": Case("--general_share 0.5", r"belongs to --general_replay and --general_kl"),
    "text-without-ratio": Case("--general_importance_file {base}/tasks/letter/train.json", r"belong to --method"),
    "disjoint-without-stream": Case("--method piece-s-disjoint", r"needs a stream"),
    "statistics-of-lift": Case("--method lift --statistics_file {base}/s", r"no meaning with --method lift"),
    "budget-of-lift": Case("--method lift --budget layer", r"--budget layer has no meaning with --method lift"),
    "ewc-with-offload": Case("--method ewc --deepspeed {base}/offload.json", r"not proven with opt"),
    "packing-is-proven": Case("--packing --scorers letter=leter", r"--scorers: 'leter' is unknown"),  # it comes later
    "memory-ratio": Case("--method gem --memory_ratio 2", r"--memory_ratio must be in \(0, 1\], got 2"),
    "lora-targets": Case("--method lora --lora_rank 2", r"unknown flag --lora_rank"),
    "select-ewc": Case("--method ewc --output_file {base}/out.m", r"--method ewc has no mask", "select"),
    "unknown-method": Case("--method piece-g", r"--method 'piece-g' is unknown.*Did you mean 'piece-"),
    "unknown-budget": Case("--budget layers", r"--budget 'layers' is unknown.*Did you mean 'layer'\?"),
    "unknown-task": Case("--task_dir {base}/tasks --tasks leter", r"no task 'leter'.*Did you mean 'letter'\?"),
    "unknown-flag": Case("--learnig_rate 1", r"unknown flag --learnig_rate\. Did you mean 'learning_rate'\?"),
    "unknown-flag-equals": Case("--mask-ratios=1", r"unknown flag --mask-ratios\. Did you mean 'mask_ratio'\?"),
    "abbreviated-flag": Case("--mask_rat 0.1", r"unknown flag --mask_rat\. Did you mean 'mask_ratio'\?"),
    "stray-word": Case("stray", r"stray"),
    "unknown-key": Case("--config {base}/key.yaml", r"unknown key 'learnig_rate'.*Did you mean 'learning_rate'\?"),
    "yaml-missing": Case("--config {base}/gone.yaml", r"gone\.yaml: no such file"),
    "yaml-broken": Case("--config {base}/broken.yaml", r"broken\.yaml is not YAML.*line 2"),
    "yaml-list": Case("--config {base}/list.yaml", r"must map flag names to values, got a list"),
    "config-without-file": Case("--config", r"--config expects a YAML file"),
    "wrong-type": Case("--learning_rate abc", r"--learning_rate.*: invalid float value: 'abc'"),
    "wrong-type-ours": Case("--max_new_tokens many", r"--max_new_tokens.*: invalid int value: 'many'"),
    "wrong-choice": Case("--lr_scheduler_type wavy", r"wavy"),
    "wrong-strategy": Case("--save_strategy sometimes", r"sometimes"),
    "both-precisions": Case("--bf16 --fp16", r"(?i)fp16.*bf16|bf16.*fp16"),
    "unproven-optimizer": Case("--optim sgd", r"--optim sgd: a zero gradient may move a weight; use one"),
    "folder-of-another-run": Case("--output_dir {base}/taken", r"belongs to another run \("),
    "folder-of-this-run": Case("--output_dir {base}/foreign", r"foreign holds 00-old but no run\.json"),
    "folder-is-a-file": Case("--output_dir {base}/row.json", r"row\.json is a file, expected a folder"),
    "resume-another-run": Case("--output_dir {base}/taken --resume_from_checkpoint True", r"belongs to another run"),
    "resume-from-a-path": Case("--resume_from_checkpoint {base}/taken", r"expects True or False"),
    "incomplete-accumulation": Case(
        "--gradient_accumulation_steps 4 --max_steps -1",
        r"6 rows make 6 micro-batches .* on 1 rank|6 rows make 3 micro-batches .* 2 ranks",
    ),
    "model-missing": Case(
        "--model_name_or_path {base}/gone", r"gone: no model can be loaded from there \(there is no such folder\)"
    ),
    "model-without-tokenizer": Case("--model_name_or_path {base}/silent", r"silent: the folder holds no tokenizer"),
    "model-without-weights": Case("--model_name_or_path {base}/light", r"light: the folder holds no weights"),
    "model-config-broken": Case("--model_name_or_path {base}/odd", r"odd: no model can be loaded from there"),
    "deepspeed-missing": Case("--deepspeed {base}/gone.json", r"gone\.json: no such file; ds_configs/ has one"),
    "deepspeed-malformed": Case("--deepspeed {base}/broken.json", r"broken\.json, line 2: not JSON"),
    "deepspeed-list": Case("--deepspeed {base}/norows.json", r"must hold an object of settings, got list"),
    "deepspeed-zenflow": Case("--deepspeed {base}/zenflow.json", r"does not work with zero_optimization\.zenflow"),
    "deepspeed-nvme": Case("--deepspeed {base}/nvme.json", r"offload_optimizer\.device \"nvme\"; use 'cpu'"),
    "tasks-without-folder": Case("--tasks letter", r"--task_dir and --tasks belong together", "stream"),
    "folder-without-tasks": Case("--task_dir {base}/tasks", r"--task_dir and --tasks belong together", "stream"),
    "file-and-stream": Case("--task_dir {base}/tasks --tasks letter", r"either --train_file .* or --task_dir"),
    "no-data": Case("", r"no data: give --train_file F, or --task_dir D", "stream"),
    "select-without-output": Case("", r"piece_ds select needs --train_file F and --output_file MASK", "select"),
    "select-seqft": Case("--method seqft --output_file {base}/out.m", r"--method seqft has no mask", "select"),
    "select-deepspeed-missing": Case(
        "--deepspeed {base}/gone.json --output_file {base}/out.m", r"no such file", "select"
    ),
    "eval-without-output": Case("", r"piece_ds evaluate needs .* and --output_file F", "eval"),
    "eval-model-missing": Case(
        "--model_name_or_path {base}/gone --output_file {base}/out.s", r"no model can be", "eval"
    ),
}
# Told apart from a file and a stream given together, which has its own message.
CASES["unknown-task"] = Case(CASES["unknown-task"].flags, CASES["unknown-task"].message, "stream")


def make_material(base: Path) -> None:
    """One of everything that a command line can name and that is wrong, and what is right beside it."""
    make_model_folder(base / "model")
    make_tasks(base / "tasks")
    write_rows(base / "row.json", make_rows(1, 6, ("A", "B")))
    texts = {
        "empty.json": "",
        "norows.json": "[]",
        "broken.json": '[{"prompt": "a", "answer": "b"},\n {"prompt": }]',
        "broken.jsonl": f"{json.dumps(GOOD_ROW)}\n{json.dumps(GOOD_ROW)}\n{{oops\n",
        "key.yaml": "learnig_rate: 1\n",
        "broken.yaml": "learning_rate: 1\n  seed: [\n",
        "list.yaml": "- learning_rate\n",
    }
    for name, text in texts.items():
        (base / name).write_text(text)
    write_rows(base / "keys.jsonl", [GOOD_ROW, {"prompt": "one"}])
    write_rows(base / "blank.jsonl", [GOOD_ROW, {"prompt": "one", "answer": " "}])
    write_rows(base / "masked.jsonl", [{"input_ids": [1, 5, 6], "labels": [-100, -100, -100]}])
    _make_masks(base)
    _make_broken_models(base)
    for name, zero in {
        "zenflow": {"zenflow": {"topk_ratio": 0.1}},
        "nvme": {"offload_optimizer": {"device": "nvme"}},
        "offload": {"offload_optimizer": {"device": "cpu"}},
    }.items():
        config = json.loads((CONFIGS / "zero2.json").read_text())
        config["zero_optimization"] |= zero
        (base / f"{name}.json").write_text(json.dumps(config))
    (base / "taken").mkdir()
    (base / "taken" / "run.json").write_text('{"MethodArguments": {"mask_ratio": 0.5}}')
    (base / "foreign" / "00-old" / "model").mkdir(parents=True)


def _make_masks(base: Path) -> None:
    make_model_folder(base / "wide_model", hidden_size=48)
    make_model_folder(base / "deep_model", num_layers=3)
    for name, folder in {"mask": "model", "wide": "wide_model", "deep": "deep_model"}.items():
        layout = layout_of(AutoModelForCausalLM.from_pretrained(base / folder))
        index = {info.name: torch.arange(0, info.numel, 7) for info in layout.parameters[1:-2:3]}
        mask = Mask(layout, index, sum(i.numel() for i in index.values()), "random", 0.1)
        save_mask(base / f"{name}.safetensors", mask)
    content = (base / "mask.safetensors").read_bytes()
    (base / "truncated.safetensors").write_bytes(content[:-40])
    (base / "flipped.safetensors").write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])


def _make_broken_models(base: Path) -> None:
    for name, without in {"silent": "tokenizer", "light": "model."}.items():
        (base / name).mkdir()
        for path in (base / "model").iterdir():
            if not path.name.startswith(without):
                (base / name / path.name).write_bytes(path.read_bytes())
    (base / "odd").mkdir()
    (base / "odd" / "config.json").write_text("{")


def flags_of(base: Path, name: str, case: Case) -> list[str]:
    """A right command line, and then what is wrong about it."""
    right = ["--deepspeed", str(CONFIGS / "zero3.json"), "--model_name_or_path", str(base / "model")]
    right += ["--output_dir", str(base / "out" / name), "--max_steps", "1", "--per_device_train_batch_size", "1"]
    if case.script != "stream" and name != "select-without-output":
        right += ["--train_file", str(base / "row.json")]
    return right + case.flags.format(base=base).split()


@pytest.fixture(scope="session")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case raised on each of two ranks; '' holds the files before and after."""
    base, job = tmp_path_factory.mktemp("refused"), tmp_path_factory.mktemp("refusals_job")
    make_material(base)
    before = tree(base)
    scripts = {"stream": "train"}
    cases = {name: (scripts.get(case.script, case.script), flags_of(base, name, case)) for name, case in CASES.items()}
    (job / "cases.json").write_text(json.dumps(cases))
    results = run_job("support.refusals_job", 2, job)
    return {**results, "": {"before": before, "after": tree(base), "out": (base / "out").exists()}}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_one_clear_line_on_every_rank(refused: dict[str, Any], name: str) -> None:
    for rank in refused[name]["ranks"]:
        assert rank["class"] == "UserError", rank["traceback"] or rank["message"]
        assert re.search(CASES[name].message, rank["message"]), rank["message"]
        assert "\n" not in rank["message"].strip()
    first, *others = refused[name]["ranks"]
    assert all(other["message"] == first["message"] for other in others)


def test_refused_runs_leave_no_file_behind(refused: dict[str, Any]) -> None:
    assert refused[""]["after"] == refused[""]["before"]
    assert not refused[""]["out"]


@pytest.mark.parametrize(
    ("launcher", "num_ranks", "flags", "message"),
    [
        ("deepspeed", 2, ["--mask_ratio", "1.5"], r"error: --mask_ratio must be in \(0, 1\], got 1\.5"),
        ("python", 1, ["--output_dir", "{base}/row.json"], r"error: --output_dir .*row\.json is a file, .*"),
        pytest.param(
            "deepspeed",
            2,
            ["--gradient_accumulation_steps", "2"],
            r"error: task row: 6 rows make 3 .*",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "deepspeed",
            1,
            ["--learnig_rate", "1"],
            r"error: unknown flag --learnig_rate\. Did you mean .*",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "deepspeed",
            2,
            ["--model_name_or_path", "{base}/gone"],
            r"error: --model_name_or_path .*",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ratio", "file", "accumulation", "flag", "model"],
)
def test_a_launch_refuses_with_one_line_and_exit_code_2(
    tmp_path: Path, launcher: str, num_ranks: int, flags: list[str], message: str
) -> None:
    make_model_folder(tmp_path / "model")
    write_rows(tmp_path / "row.json", make_rows(1, 6, ("A", "B")))
    before = tree(tmp_path)
    right = [
        "--deepspeed",
        CONFIGS / "zero3.json",
        "--model_name_or_path",
        tmp_path / "model",
        "--train_file",
        tmp_path / "row.json",
        "--output_dir",
        tmp_path / "out",
        "--per_device_train_batch_size",
        1,
    ]
    run = launch(launcher, num_ranks, "train.py", *right, *(flag.format(base=tmp_path) for flag in flags))
    assert run.returncode == 2, run.stderr[-3000:]
    assert len(error_lines(run)) == 1
    assert re.fullmatch(message, error_lines(run)[0])
    assert "Traceback" not in run.stderr + run.stdout
    assert tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_machine_that_cannot_compile_the_kernels_is_told_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    run = launch("python", 1, "train.py", "--output_dir", tmp_path / "out")
    assert run.returncode == 2, run.stderr[-3000:]
    assert len(error_lines(run)) == 1
    assert "no C++ compiler 'no-such-compiler'" in error_lines(run)[0]
    assert "PIECE_DS_BACKEND=reference" in error_lines(run)[0]
    assert not (tmp_path / "out").exists()
