"""Explain keys and flags of other trainers: what to write instead."""

from collections.abc import Sequence

from piece_ds.runtime.errors import closest

_TRAIN_FILE = "train_file F, or task_dir with tasks"
_QUANTIZED = (
    "nothing: single weights of a quantized matrix cannot be trained; give the 16-bit model (docs/deepspeed.md)"
)
_ANSWERS = "nothing: the loss is on answers, of conversations on the assistant's turns (docs/data.md)"
_FULL = "nothing: weights are selected and trained in place; method lora trains adapters"

# Key of LLaMA-Factory, Axolotl, TRL, torchtune, ms-swift or unsloth -> what to write instead.
_INSTEAD = {
    "model": "model_name_or_path",
    "model_id": "model_name_or_path",
    "model_name": "model_name_or_path",
    "base_model": "model_name_or_path",
    "tokenizer_name_or_path": "nothing: the model's own tokenizer is used",
    "dataset": _TRAIN_FILE,
    "datasets": _TRAIN_FILE,
    "dataset_name": _TRAIN_FILE,
    "dataset_path": _TRAIN_FILE,
    "dataset_dir": "task_dir with tasks",
    "train_dataset": _TRAIN_FILE,
    "eval_dataset": "eval_file F",
    "val_size": "validation_share",
    "val_set_size": "validation_share",
    "template": "chat_template true: the model's own is used",
    "dataset_text_field": "columns",
    "cutoff_len": "max_prompt_len and max_ans_len",
    "max_seq_length": "max_prompt_len and max_ans_len",
    "max_seq_len": "max_prompt_len and max_ans_len",
    "max_length": "max_prompt_len and max_ans_len",
    "sequence_len": "max_prompt_len and max_ans_len",
    "model_max_length": "max_prompt_len and max_ans_len",
    "max_samples": "max_train_samples",
    "sample_packing": "packing",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps (below 1: a share of the steps)",
    "optimizer": "optim",
    "flash_attention": "attn_implementation flash_attention_2",
    "flash_attn": "attn_implementation flash_attention_2",
    "torch_dtype": "dtype",
    "precision": "bf16 or fp16",
    "overwrite_cache": "tokenized_cache False",
    "preprocessing_num_workers": "nothing: rows are tokenized at once",
    "stage": "nothing: training is supervised fine-tuning",
    "finetuning_type": _FULL,
    "adapter": _FULL,
    "lora_rank": "lora_r, with method lora",
    "target_modules": "lora_target_modules, with method lora",
    "use_peft": _FULL,
    "load_in_8bit": _QUANTIZED,
    "load_in_4bit": _QUANTIZED,
    "use_qlora": _QUANTIZED,
    "quantization_bit": _QUANTIZED,
    "bnb_4bit_quant_type": _QUANTIZED,
    "assistant_only_loss": _ANSWERS,
    "completion_only_loss": _ANSWERS,
    "train_on_prompt": _ANSWERS,
    "train_on_inputs": _ANSWERS,
    "max_prompt_length": "max_prompt_len",
    "max_completion_length": "max_ans_len",
    "packing_strategy": "packing, with pack_tokens N",
    "streaming": "nothing: large files are tokenized once and mapped, not held in memory",
    "dataset_train_split": _TRAIN_FILE,
    "save_safetensors": "nothing: models are always saved as safetensors",
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy group_by_length",
    "plot_loss": "nothing: report.html has the curves",
    "wandb_project": "report_to wandb, and the variable WANDB_PROJECT",
    "wandb_name": "run_name",
    "no_cuda": "use_cpu",
    "tp_size": "nothing: the model is partitioned by DeepSpeed's ZeRO",
}


def unknown_keys(names: Sequence[str], known: Sequence[str]) -> str:
    """Return one line about unknown keys, each with what to write instead, if that is known."""
    if len(names) == 1:
        return f"unknown key {names[0]!r} in the YAML file.{hint(names[0], known)}"

    # Keys with a hint come first; the others are only listed.
    hints = {name: hint(name, known).strip() for name in names}
    told = "; ".join(f"{name!r}: {text}" for name, text in hints.items() if text)
    plain = ", ".join(repr(name) for name, text in hints.items() if not text)
    return f"unknown keys in the YAML file: {'; '.join(filter(None, (told, plain)))}"


def hint(name: str, known: Sequence[str]) -> str:
    """Return ' ...' about an unknown key or flag: what to write instead, or of which it is a misspelling; else ''."""
    if name in _INSTEAD:
        return f" Another trainer's; here {_INSTEAD[name]}"

    # No other trainer's, as far as is known: perhaps a misspelt one of ours.
    match = closest(name, known)
    if match:
        return f" Did you mean {match!r}?"
    return f" Another trainer's; here {_FULL}" if name.startswith(("lora_", "peft_")) else ""
