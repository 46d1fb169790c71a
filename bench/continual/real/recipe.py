"""What decides the figures of the study beside the grid."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Budget of a run; the same for every method.

    Attributes:
        train_rows: first rows of the task's training file, which are also those of the statistics pass.
        test_rows: first rows of its test file; the learned loss is measured on their answers.
        max_prompt_len, max_ans_len: tokens; a prompt keeps its last so many.
        steps, rows: optimizer steps, and rows of a step.
        importance_batch_size: rows of a micro-batch of the statistics pass.
        general_rows: rows of general text that a method may use (importance and replay).
        judged_rows, judged_tokens: rows of each judged text, and their length.
        lr_scheduler_type, adam_beta2: of AdamW; weight decay 0, clipping 1.0.
    """

    train_rows: int = 256
    test_rows: int = 64
    max_prompt_len: int = 96
    max_ans_len: int = 32
    steps: int = 24
    rows: int = 8
    importance_batch_size: int = 4
    importance_rows: int = 96
    general_rows: int = 128
    judged_rows: int = 24
    judged_tokens: int = 96
    lr_scheduler_type: str = "linear"
    adam_beta2: float = 0.95


# Does it work? The figures say nothing.
SMOKE = Recipe(steps=2, train_rows=16, test_rows=4, judged_rows=2)
