"""The settings the embedded default runs with, each chosen by measurement on the embedded model.

A ratio of 0.1 % is for models of billions of parameters: of this model it would leave some hundred weights. At 10 % and
a rate of 1.5 times that of full fine-tuning, PIECE-S learns the tasks nearly as well and loses less of the rest.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class EmbeddedRecipe:
    """Sizes of the generated data and settings of the runs; rates are AdamW's, batch sizes are over all ranks.

    Attributes:
        num_base_rows: rows of base material; base_steps pass over them about 1.3 times.
        text_share: part of them that is source text, in (0, 1); the others are base skills in equal parts.
        text_bytes: length of a piece of source text.
        num_general_rows: pieces of held-out source text.
        num_train_rows: training rows of each task; also the rows of the statistics pass.
        num_eval_rows: rows of each task's eval.json.
        num_test_rows: rows of each task's test.json.
        base_steps: optimizer steps that make the base model.
        base_batch_size: rows of such a step.
        base_learning_rate: its peak, after base_warmup_steps, then falling along a cosine to about 5 % of it.
        base_warmup_steps: steps of linear warm-up.
        task_steps: optimizer steps of each task, at a constant rate.
        task_batch_size: rows of such a step.
        mask_ratio: selected elements / elements of the model.
        mask_learning_rate: for training selected weights (PIECE-S and the other selections).
        full_learning_rate: for plain sequential fine-tuning.
        importance_batch_size: rows of a micro-batch of the statistics pass.
        max_prompt_length: tokens, with room for BOS.
        max_answer_length: tokens, with room for EOS and a piece of source text.
        max_new_tokens: tokens to generate for an answer: one character and EOS.
        adam_beta2: for base and stream; beta1 is 0.9, weight decay 0, clipping 1.0 throughout.
    """

    num_base_rows: int = 40000
    text_share: float = 0.25
    text_bytes: int = 40
    num_general_rows: int = 256
    num_train_rows: int = 2048
    num_eval_rows: int = 128
    num_test_rows: int = 256

    base_steps: int = 560
    base_batch_size: int = 96
    base_learning_rate: float = 6e-3
    base_warmup_steps: int = 28

    task_steps: int = 100
    task_batch_size: int = 64
    mask_ratio: float = 0.1
    mask_learning_rate: float = 1.5e-3
    full_learning_rate: float = 1e-3
    importance_batch_size: int = 8

    max_prompt_length: int = 32
    max_answer_length: int = 48
    max_new_tokens: int = 2
    adam_beta2: float = 0.95
