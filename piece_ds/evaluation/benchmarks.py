"""Benchmarks of general ability: HumanEval and lm-evaluation-harness, if the settings ask for them."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from piece_ds.config.output_arguments import EvaluationArguments
from piece_ds.config.settings import Settings
from piece_ds.data.tokenize import Encoder
from piece_ds.evaluation import humaneval
from piece_ds.evaluation.generate import Decoding, generate_texts
from piece_ds.evaluation.harness import check_harness, run_harness
from piece_ds.evaluation.scorers import AUTHORS
from piece_ds.runtime.distributed import is_main
from piece_ds.runtime.files import write_text

# Most tokens of a completion: the authors' number, and what the benchmark's own paper leaves room for.
_TOKENS_OF_AUTHORS, _TOKENS = 128, 512


def check_ability(asked: EvaluationArguments) -> None:
    """Raise UserError if a benchmark is not installed or cannot run on this machine.

    No weight has been read by then.
    """
    if asked.humaneval:
        humaneval.check_humaneval()
    if asked.lm_eval_tasks:
        check_harness(asked.lm_eval_tasks, asked.lm_eval_path)


def run_benchmarks(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, settings: Settings, device: Any, folder: Path
) -> dict[str, float]:
    """Return measure -> value of every benchmark that the settings ask for; empty if there is none. A collective.

    Args:
        model: a causal model of transformers, or the DeepSpeed engine around one.
        tokenizer: the model's.
        batch_size: rows in a forward pass on each rank.
        settings: the run's.
        device: where the batches go.
        folder: rank 0 writes HumanEval's completions there, each with its result.
    """
    asked = settings.evaluation
    found: dict[str, float] = {}
    if asked.humaneval:
        found["HumanEval pass@1"] = _humaneval(model, tokenizer, batch_size, settings, device, folder)
    if asked.lm_eval_tasks:
        found |= run_harness(
            model, tokenizer, asked.lm_eval_tasks, asked.lm_eval_path, asked.lm_eval_limit, batch_size, device
        )
    return found


def _humaneval(
    model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, settings: Settings, device: Any, folder: Path
) -> float:
    """Return the share of problems whose only completion passes.

    Prompts are used as they are, without chat template.
    """
    asked, problems = settings.evaluation, humaneval.load_problems()
    by_authors = asked.scoring == AUTHORS
    encoder = Encoder(tokenizer, settings.data.cutoff)

    # One completion per problem.
    texts = generate_texts(
        model,
        [encoder.prompt_ids(problem.prompt) for problem in problems],
        tokenizer,
        _TOKENS_OF_AUTHORS if by_authors else _TOKENS,
        batch_size,
        device,
        Decoding(sample=asked.sample, seed=asked.sample_seed),
        description="HumanEval",
    ).texts

    # Cut each completion where its function ends, and run it.
    cut = humaneval.cut_as_authors if by_authors else humaneval.cut_at_next_definition
    completions = [cut(text) for text in texts]
    passed = humaneval.passed(problems, completions)
    if is_main():
        rows = zip(problems, completions, passed, strict=True)
        lines = [json.dumps({"task_id": p.name, "completion": c, "passed": right}) for p, c, right in rows]
        write_text(folder / "HumanEval.jsonl", "".join(line + "\n" for line in lines))
    return sum(passed) / len(passed)
