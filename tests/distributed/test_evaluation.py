"""Loss, texts and scores are the same for one process and for two ranks under ZeRO-2 and 3; no rank waits for another.

Run as a script this file is the worker of its own tests: one rank of a job that torchrun started.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from piece_ds.data.collate import Collator
from piece_ds.data.tokenize import Encoder
from piece_ds.demo.model import make_tokenizer
from piece_ds.evaluation.generate import Decoding, generate_texts
from piece_ds.evaluation.humaneval import Problem, passed
from piece_ds.evaluation.loss import evaluate_loss
from piece_ds.evaluation.scorers import get_scorer, scorer_names
from piece_ds.runtime.distributed import all_gather_objects, is_main

# Lengths differ a lot, and neither 7 rows nor 4 batches of 2 divide among the ranks evenly in every case below.
PAIRS = [("a" * length, "b" * (1 + length % 3)) for length in (1, 30, 5, 17, 3, 9, 12)]
ROW_COUNTS = (0, 1, 5, 7)


@pytest.fixture(scope="module")
def alone() -> Iterator[dict[str, Any]]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield evaluate(tiny_model(), make_tokenizer(128))
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_equal_one_process(tmp_path: Path, alone: dict[str, Any], stage: int) -> None:
    together = run_job(tmp_path, num_ranks=2, stage=stage)
    assert together["texts"] == alone["texts"]
    assert together["tokens"] == alone["tokens"]
    assert together["drawn"] == alone["drawn"] != alone["texts"]["7"]
    assert together["scores"] == alone["scores"]  # the same bits: JSON keeps every digit
    assert together["passed"] == alone["passed"] == [True, False] * 3 + [True]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-6)


def test_generations_end_at_different_steps(alone: dict[str, Any]) -> None:
    """Otherwise the jobs above would not show that an early rank keeps step with a late one."""
    assert len({len(text) for text in alone["texts"]["7"]}) > 2


def test_the_scores_that_are_compared_are_between_nothing_and_everything(alone: dict[str, Any]) -> None:
    assert all(
        0 < alone["scores"][f"{name} {scoring}"]["score"] < 1
        for name in ("text", "simplification", "code")
        for scoring in ("clean", "authors")
    )


def tiny_model() -> LlamaForCausalLM:
    """A random Llama whose answers end after a few tokens, at different lengths, and that has dropout."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.3,
        initializer_range=0.4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=list(range(2, 30)),  # so many ends that some answers stop soon
    )
    return LlamaForCausalLM(config).train()


def evaluate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Everything that is compared, for several numbers of rows."""
    encoder = Encoder(tokenizer, cutoff=64)
    rows = [encoder.pair(prompt, answer, "row") for prompt, answer in PAIRS]
    prompts = [encoder.prompt_ids(prompt) for prompt, _ in PAIRS]
    results: dict[str, Any] = {"losses": {}, "tokens": {}, "texts": {}}
    for num_rows in ROW_COUNTS:
        loss = evaluate_loss(model, rows[:num_rows], Collator(pad_id=0), batch_size=2, device="cpu")
        results["losses"][str(num_rows)] = loss.sum_loss
        results["tokens"][str(num_rows)] = loss.num_tokens
        results["texts"][str(num_rows)] = generate_texts(model, prompts[:num_rows], tokenizer, 24, 2, "cpu").texts
    drawn = Decoding(sample=True, temperature=1.0, top_k=50)
    results["drawn"] = generate_texts(model, prompts, tokenizer, 24, 2, "cpu", drawn).texts
    # The model writes noise, so the gold answers are pieces of what it wrote, cut at different places.
    outputs, questions = results["texts"]["7"], [prompt for prompt, _ in PAIRS]
    golds = [output[: 1 + index % 5] or "A" for index, output in enumerate(outputs)]
    results["scores"] = {
        f"{name} {scoring}": get_scorer(name).score(outputs, golds, questions, scoring)
        for name in scorer_names()
        for scoring in ("clean", "authors")
        if get_scorer(name).generates
    }
    problems = [Problem(str(index), "", "", "f") for index in range(len(PAIRS))]
    completions = [str(index % 2) for index in range(len(PAIRS))]
    results["passed"] = passed(problems, completions, lambda submission: submission.program.startswith("0"))
    assert model.training
    return results


def run_job(folder: Path, num_ranks: int, stage: int) -> dict[str, Any]:
    """What rank 0 of a torchrun job wrote; the job has a minute, so that a deadlock fails instead of hanging."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    command += [__file__, str(stage), str(folder / "results.json")]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def main(stage: int, path: Path) -> None:
    """One rank: the model under a DeepSpeed engine of the stage, evaluated; all ranks must agree."""
    import deepspeed

    from piece_ds.runtime.process import start_distributed

    torch.set_num_threads(1)
    start_distributed()
    model = tiny_model()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    results = evaluate(engine, make_tokenizer(128))
    assert all(other == results for other in all_gather_objects(results))
    if is_main():
        path.write_text(json.dumps(results))
    engine.destroy()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # gloo's threads abort a process that exits without it,
    sys.stdout.flush()
    os._exit(0)  # and once in a long while one that goes on to take the interpreter down


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
