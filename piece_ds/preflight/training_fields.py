"""List every field of transformers' TrainingArguments: it works, is refused, or has no effect and the run says so.

docs/training-arguments.md is this table. A field that a newer transformers adds is missing here, and the run says that
too.
"""

from dataclasses import dataclass
from typing import Any

WORKS, REFUSED, NO_EFFECT = "works", "refused", "no effect"


@dataclass(frozen=True)
class Treatment:
    """What becomes of a field.

    Attributes:
        kind: WORKS, REFUSED (unless it has its neutral value) or NO_EFFECT.
        note: what to know; of a refused field why, and what to do instead.
        low, high: finite numbers that are taken, both included; None is no bound.
        above: the number is greater than this.
        below: the number is less than this.
    """

    kind: str
    note: str = ""
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def range_error(self, value: Any) -> str | None:
        """Return what was expected of value, or None if it is in range or no number."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        outside = (
            (self.low is not None and not value >= self.low)
            or (self.high is not None and not value <= self.high)
            or (self.above is not None and not value > self.above)
            or (self.below is not None and not value < self.below)
        )
        bounded = any(bound is not None for bound in (self.low, self.high, self.above, self.below))
        if not outside and (not bounded or abs(value) != float("inf")):
            return None
        bounds = (("of at least", self.low), ("above", self.above), ("below", self.below), ("of at most", self.high))
        shown = [f"{word} {bound:.16g}" for word, bound in bounds if bound is not None]
        return f"a finite number {' and '.join(shown)}"


def _works(note: str = "", **bounds: float) -> Treatment:
    return Treatment(WORKS, note, **bounds)


def _refused(note: str) -> Treatment:
    return Treatment(REFUSED, note)


def _no_effect(note: str) -> Treatment:
    return Treatment(NO_EFFECT, note)


_COUNT = 2**31 - 1
_SEED = 2**32 - 1  # numpy's limit
_OWN_EVALUATION = "evaluation sums the loss of all answer tokens on the device; scores are --scorers'"
_ONE_PUSH = "there is one push, when the run ends"
_NOT_DDP = "DeepSpeed's engine and not DistributedDataParallel reduces gradients"
_NO_STEPS = "the command says what is done: piece_ds train, select or evaluate"
_FSDP = "masks live in DeepSpeed's engine: use --deepspeed zero3, which partitions the same"
_COMPILED = "a compiled backward pass is not proven with sampled gradients; leave it out"

FIELDS: dict[str, Treatment] = {
    # Length, batch and rate.
    "output_dir": _works("the run's folder; a task's trainer writes into its NN-TASK"),
    "per_device_train_batch_size": _works(low=1, high=_COUNT),
    "per_device_eval_batch_size": _works("also of this package's evaluations", low=1, high=_COUNT),
    "num_train_epochs": _works("of every task", above=0, high=_COUNT),
    "max_steps": _works("of every task; -1: num_train_epochs decides", low=-1, high=_COUNT),
    "learning_rate": _works(low=0),
    "lr_scheduler_type": _works("made on a dummy optimizer before a weight is read; needs of kwargs are said then"),
    "lr_scheduler_kwargs": _works("as JSON; names that the schedule does not know are refused"),
    "warmup_steps": _works("below 1: a share of the steps", low=0, high=_COUNT),
    "gradient_accumulation_steps": _works(low=1, high=_COUNT),
    "average_tokens_across_devices": _works(),
    "max_grad_norm": _works("0: gradients are not clipped", low=0),
    "label_smoothing_factor": _works("in training; importance is taken of the plain loss", low=0, below=1),
    "neftune_noise_alpha": _works("in training; importance is taken without noise", low=0, high=10_000),
    # Optimizer.
    "optim": _works("with a mask: AdamW of torch or Apex; others move weights whose gradient is zero"),
    "optim_args": _works("the optimizer is made on a dummy parameter before a weight is read"),
    "optim_target_modules": _refused("it belongs to GaLore and APOLLO, which masks are not proven with: leave it out"),
    "weight_decay": _works("of selected weights only", low=0),
    "adam_beta1": _works(low=0, below=1),
    "adam_beta2": _works(low=0, below=1),
    "adam_epsilon": _works(above=0),
    # Precision, memory and speed.
    "bf16": _works(),
    "fp16": _works(),
    "bf16_full_eval": _no_effect("models are judged in the dtype that they train in; refused without bf16"),
    "fp16_full_eval": _no_effect("models are judged in the dtype that they train in; refused without fp16"),
    "tf32": _works("on GPUs that have it"),
    "activation_checkpointing": _works("the newer name of gradient_checkpointing"),
    "activation_checkpointing_kwargs": _works(),
    "gradient_checkpointing": _works(),
    "gradient_checkpointing_kwargs": _works(),
    "torch_compile": _refused(_COMPILED),
    "torch_compile_backend": _refused(_COMPILED),
    "torch_compile_mode": _refused(_COMPILED),
    "use_liger_kernel": _refused("its fused layers are not proven with sampled gradients; leave it out"),
    "liger_kernel_config": _refused("see use_liger_kernel; leave it out"),
    "use_cache": _works("in training; the saved model keeps its own"),
    "torch_empty_cache_steps": _works(low=1, high=_COUNT),
    "auto_find_batch_size": _refused(
        "a smaller batch would begin the task anew in a new engine: choose --per_device_train_batch_size "
        "(piece_ds plan says what fits)"
    ),
    # Logs and reporters.
    "logging_strategy": _works(),
    "logging_steps": _works(above=0, high=_COUNT),
    "logging_first_step": _works(),
    "log_on_each_node": _works("not tested over several nodes"),
    "logging_nan_inf_filter": _works("of the log; --nonfinite says what a step does"),
    "include_num_input_tokens_seen": _works(),
    "log_level": _works("of transformers' own messages"),
    "log_level_replica": _works("of transformers' own messages"),
    "disable_tqdm": _works(),
    "report_to": _works("one run of a reporter for the whole stream"),
    "run_name": _works("default: the output folder's name"),
    "project": _works("Trackio's; not tested"),
    "trackio_space_id": _works("Trackio's; not tested"),
    "trackio_bucket_id": _works("Trackio's; not tested"),
    "trackio_static_space_id": _works("Trackio's; not tested"),
    # The trainer's own evaluation.
    "eval_strategy": _works("exact loss on the task's eval rows while it trains"),
    "eval_steps": _works(above=0, high=_COUNT),
    "eval_delay": _works(low=0, high=_COUNT),
    "eval_on_start": _works(),
    "prediction_loss_only": _no_effect(_OWN_EVALUATION),
    "eval_do_concat_batches": _no_effect(_OWN_EVALUATION),
    "eval_use_gather_object": _no_effect(_OWN_EVALUATION),
    "eval_accumulation_steps": _no_effect(_OWN_EVALUATION),
    "include_for_metrics": _no_effect(_OWN_EVALUATION),
    "batch_eval_metrics": _no_effect(_OWN_EVALUATION),
    "label_names": _no_effect(_OWN_EVALUATION),
    "metric_for_best_model": _works(
        "loss, score (the task's own) or loss_within_budget (with --forgetting_budget); for the best step, "
        "--save_strategy best and reduce_lr_on_plateau"
    ),
    "greater_is_better": _works(),
    "load_best_model_at_end": _works(
        "each task ends with its best step on held-out rows; with a mask it takes no checkpoint, seqft needs "
        "--save_strategy best or a checkpoint at every evaluation"
    ),
    # Checkpoints.
    "save_strategy": _works(),
    "save_steps": _works("given: checkpoints are on", above=0, high=_COUNT),
    "save_total_limit": _works(low=1, high=_COUNT),
    "save_only_model": _refused(
        "a checkpoint without the optimizer cannot be resumed from; the trained model is in model/ anyway"
    ),
    "save_on_each_node": _works("not tested over several nodes"),
    "enable_jit_checkpoint": _refused("SIGTERM and SIGINT write a checkpoint here without it: leave it out"),
    "resume_from_checkpoint": _works("True or False: where to start again is found in --output_dir"),
    "ignore_data_skip": _works(),
    "restore_callback_states_from_checkpoint": _works(),
    # The Hub.
    "push_to_hub": _works("when the run ends, what `piece_ds delta push` sends: deltas, card and manifest"),
    "hub_token": _works("default: that of HF_TOKEN or hf auth login; it is written nowhere"),
    "hub_private_repo": _works("makes a private repository; a public one is refused"),
    "hub_model_id": _works("user/name, or a name of the token's owner; default: the output folder's name"),
    "hub_strategy": _no_effect(_ONE_PUSH),
    "hub_always_push": _no_effect(_ONE_PUSH),
    "hub_revision": _works("a branch, made if it is missing"),
    # What is drawn, and the device.
    "full_determinism": _works("see also --deterministic"),
    "seed": _works(low=0, high=_SEED),
    "data_seed": _works(low=0, high=_SEED),
    "use_cpu": _works(),
    # Rows.
    "accelerator_config": _works(
        "non_blocking and use_seedable_sampler; others change which rows a rank takes, and are refused"
    ),
    "dataloader_drop_last": _works(),
    "dataloader_num_workers": _works(low=0, high=4096),
    "dataloader_pin_memory": _works(),
    "dataloader_persistent_workers": _works("needs dataloader_num_workers"),
    "dataloader_prefetch_factor": _works("needs dataloader_num_workers", low=1, high=_COUNT),
    "dataloader_multiprocessing_context": _works("needs dataloader_num_workers"),
    "dataloader_in_order": _works("false: micro-batches come as workers finish them, and no run repeats another"),
    "remove_unused_columns": _no_effect("the collator needs columns that no model takes, and leaves them out itself"),
    "train_sampling_strategy": _works(),
    "length_column_name": _works("with train_sampling_strategy group_by_length; rows without it are measured"),
    # Other ways to spread a model.
    "parallelism_config": _refused(
        "DeepSpeed's engine partitions the model: leave it out; --sequence_parallel_size shares rows"
    ),
    "ddp_find_unused_parameters": _no_effect(_NOT_DDP),
    "ddp_bucket_cap_mb": _no_effect(_NOT_DDP),
    "ddp_broadcast_buffers": _no_effect(_NOT_DDP),
    "ddp_static_graph": _no_effect(_NOT_DDP),
    "ddp_backend": _no_effect("DeepSpeed chooses the device's own: NCCL, or Gloo on a CPU"),
    "ddp_timeout": _works("seconds", low=1, high=_COUNT),
    "fsdp": _refused(_FSDP),
    "fsdp_config": _refused(_FSDP),
    "deepspeed": _works("a file, its content, or zero0, zero1, zero2, zero3, ...; default zero3"),
    "local_rank": _no_effect("ranks come from the launcher's environment"),
    # Scripts and debugging.
    "debug": _refused("its hooks end a run in a traceback: --nonfinite says which step was not finite"),
    "skip_memory_metrics": _works(),
    "do_train": _no_effect(_NO_STEPS),
    "do_eval": _no_effect(_NO_STEPS),
    "do_predict": _no_effect(_NO_STEPS),
}
