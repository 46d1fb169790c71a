"""Define settings of what is written and how it is judged that transformers' TrainingArguments does not have.

As in arguments.py, ranges are checked in __post_init__.
"""

from dataclasses import dataclass, field
from math import isfinite

from piece_ds.config.ranges import require_choice, require_not_negative, require_positive
from piece_ds.runtime.errors import UserError

SCORINGS = ["clean", "authors"]
SAVE_MODEL = ["last", "each", "never"]
NONFINITE = ["stop", "skip"]
DELTA_CODINGS = ["indices", "gaps", "smallest"]


@dataclass
class OutputArguments:
    """What is written besides masks, deltas and results, and what happens at an epoch's end."""

    incomplete_accumulation: str = field(
        default="refuse",
        metadata={"help": "an epoch's last step with fewer micro-batches than the others: refuse or smaller_step"},
    )

    nonfinite: str = field(
        default="stop",
        metadata={"help": "a step whose loss or gradient is NaN or infinite is never taken: stop the run, or skip it"},
    )

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "remove the run that --output_dir holds when the first step can be taken"}
    )

    save_model: str = field(default="last", metadata={"help": "transformers folder after: last task, each task, never"})

    delta_every: int | None = field(
        default=None,
        metadata={
            "help": "every N optimizer steps, write what the selected weights have changed since the last time as a "
            "small file in NN-task/chain, for copies of the model that follow the training"
        },
    )

    delta_coding: str = field(
        default="indices",
        metadata={
            "help": "of delta.safetensors: indices, which every program of the format reads, gaps, or smallest, less "
            "than half the bytes; piece_ds reads all, and `piece_ds delta compose --coding` turns one into another"
        },
    )

    save_full: bool = field(
        default=False,
        metadata={"help": "compact mode: --save_steps writes the whole model, not only what the task changes"},
    )

    deterministic: bool = field(
        default=False,
        metadata={
            "help": "on a GPU: train with torch's deterministic algorithms, so that the same command gives the same "
            "weights on the same machine; an operation that has none ends the run (statistics always ask for them)"
        },
    )
    output_file: str | None = field(
        default=None, metadata={"help": "the one file that `select` (a mask) and `evaluate` (scores) write"}
    )

    def __post_init__(self) -> None:
        require_choice("save_model", self.save_model, SAVE_MODEL)
        if self.delta_every is not None:
            require_positive("delta_every", self.delta_every)
        require_choice("delta_coding", self.delta_coding, DELTA_CODINGS)
        require_choice("nonfinite", self.nonfinite, NONFINITE)
        require_choice("incomplete_accumulation", self.incomplete_accumulation, ["refuse", "smaller_step"])


@dataclass
class EvaluationArguments:
    """What a model is judged by, before any task and after each, and which step of a task is kept."""

    scorers: str | None = field(
        default=None,
        metadata={
            "help": "TASK=NAME,TASK=NAME with letter, reasons, stance, number, word, exact, text, simplification, "
            "code, vqa, caption or loss (nothing is generated); without it TRACE's own for its tasks, else by the gold "
            "answers"
        },
    )
    scoring: str = field(default="clean", metadata={"help": "clean, or authors: the authors' parsers and formulas"})
    max_new_tokens_text: int = field(default=256, metadata={"help": "tokens generated for free text or a line of code"})
    sample: bool = field(
        default=False, metadata={"help": "draw tokens as the authors do (0.3, top 10, 0.95) instead of the likeliest"}
    )
    sample_seed: int = field(default=42, metadata={"help": "seed of --sample; any number of ranks draws the same"})
    forward_transfer: bool = field(
        default=False, metadata={"help": "after each task judge the next one too, untrained: gives forward transfer"}
    )
    humaneval: bool = field(
        default=False, metadata={"help": "pass@1 on HumanEval: runs code that the model wrote, shut off (extra: eval)"}
    )
    lm_eval_tasks: str | None = field(
        default=None, metadata={"help": "comma-separated tasks of lm-evaluation-harness, run beside ours (extra: eval)"}
    )
    lm_eval_path: str | None = field(default=None, metadata={"help": "folder with the harness's YAML files of tasks"})
    lm_eval_limit: int | None = field(default=None, metadata={"help": "the harness uses the first N rows of each task"})

    kl_tokens: int = field(
        default=512,
        metadata={
            "help": "log KL(base model || model) on the first N answer tokens of each task's held-out rows and of "
            "--general_file; 0: off"
        },
    )

    load_best_model_at_end: bool = field(
        default=False,
        metadata={
            "help": "end each task with the weights of its best step by --metric_for_best_model (loss, score or "
            "loss_within_budget) on the held-out rows, as --eval_strategy evaluates them; with a mask it needs no "
            "checkpoint"
        },
    )
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "end a task after so many evaluations in a row without a gain"}
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "the least that --metric_for_best_model must gain to count as a gain"}
    )

    def __post_init__(self) -> None:
        require_choice("scoring", self.scoring, SCORINGS)
        require_positive("max_new_tokens_text", self.max_new_tokens_text)
        require_not_negative("sample_seed", self.sample_seed)
        if self.kl_tokens < 0:
            raise UserError(f"--kl_tokens must be 0 or more, got {self.kl_tokens}")
        if self.lm_eval_limit is not None:
            require_positive("lm_eval_limit", self.lm_eval_limit)

        if self.early_stopping_patience is not None:
            require_positive("early_stopping_patience", self.early_stopping_patience)
        if not (isfinite(self.early_stopping_threshold) and self.early_stopping_threshold >= 0):
            raise UserError(f"--early_stopping_threshold must be 0 or more, got {self.early_stopping_threshold}")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise UserError("--early_stopping_threshold belongs to --early_stopping_patience")

        # Without its tasks, the harness's other flags would be ignored silently.
        if not self.lm_eval_tasks and (self.lm_eval_path or self.lm_eval_limit):
            raise UserError("--lm_eval_path and --lm_eval_limit belong to --lm_eval_tasks")
