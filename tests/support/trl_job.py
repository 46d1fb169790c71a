"""A script as a TRL user writes it, started with plain python or by a launcher: a trainer, two steps."""

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import deepspeed
import torch
import trl
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from piece_ds import PieceCallback
from piece_ds.demo.model import make_tokenizer, model_config
from piece_ds.methods import estimate
from piece_ds.runtime.distributed import barrier, is_main, world_size
from piece_ds.runtime.errors import UserError

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
    for i in range(8)
]
PAIRS = [{"prompt": f"say {i}: ", "completion": f"it is {i}"} for i in range(8)]
# Seven: of micro-batches of two rows, the last one is shorter than the one that another rank has at that time.
PREFERENCES = [{"prompt": f"say {i}: ", "chosen": "it is " + i * f"{i}", "rejected": "no"} for i in range(7)]
PROMPTS = [{"prompt": f"say {i}: "} for i in range(7)]
# Labels in an order that gives micro-batches of both kinds, of one kind, and of a single row.
LABELS = [True, False, True, True, False, False, True]
UNPAIRED = [
    {"prompt": i * f"{i}" + "say: ", "completion": "it is " + (7 - i) * f"{i}", "label": label}
    for i, label in enumerate(LABELS)
]

GENERAL: dict[str, Any] = {
    "method": "piece-ratio",
    "step_scale": "general",
    "general_text": [
        {"input_ids": [1, *ids], "labels": [-100, *ids]} for ids in (range(i, i + 10) for i in range(20, 25))
    ],
    "general_replay": 0.5,
    "general_kl": 1.0,
}

# kind -> rows and options of SFTConfig.
SFT: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "assistant-only": (CHAT, {"assistant_only_loss": True}),
    "completion-only": (PAIRS, {"completion_only_loss": True}),
    "packing": (PAIRS, {"packing": True, "max_length": 64}),
    "padding-free": (PAIRS[:7], {"padding_free": True, "max_length": None}),
    "dft": (CHAT, {"assistant_only_loss": True, "loss_type": "dft"}),
}
# Of trainers that make completions. They are long enough for some to end before others: at equal lengths the loss of a
# group is 0, whatever was drawn.
COMPLETIONS: dict[str, Any] = {"max_completion_length": 64}
GROUPS: dict[str, Any] = {"num_generations": 2, **COMPLETIONS}

# Folder -> prefix of the names, and options.
EXPERIMENTAL: dict[str, tuple[str, dict[str, Any]]] = {
    "orpo": ("ORPO", {}),
    "gmpo": ("GMPO", GROUPS),
    "online_dpo": ("OnlineDPO", {"max_new_tokens": 16}),
    "a2po": ("A2PO", {}),
}

# Training arguments of all kinds.
COMMON: dict[str, Any] = {
    "deepspeed": {
        "zero_optimization": {"stage": 2},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    },
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "max_steps": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
}


def main() -> None:
    kind, mode, folder, stage = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int((*sys.argv, "2")[4])
    COMMON["deepspeed"]["zero_optimization"]["stage"] = stage
    trainer = make_trainer(kind, folder)
    before, initial = whole_weights(trainer.model), copy.deepcopy(trainer.model) if stage < 3 else None
    options = GENERAL if mode == "general" else {"method": mode} if mode == "migu" else {"update_mode": mode}
    try:
        callback = PieceCallback(trainer, ratio=0.01, importance_batch_size=2, **options)
    except UserError as error:
        (folder / "found.json").write_text(json.dumps({"refused": str(error)}))
        return
    trainer.add_callback(callback)
    taken = watched_sums()
    batches = watched_completions(trainer)
    trainer.train()
    assert callback.mask is not None
    index = callback.mask.whole()
    inside = outside = 0
    for name, param in whole_weights(trainer.model).items():
        if name in before:  # compact mode has one parameter more
            moved = (param != before[name]).reshape(-1)
            selected = torch.zeros_like(moved)
            selected[index.get(name, torch.empty(0, dtype=torch.int64)).long()] = True
            inside, outside = inside + int((moved & selected).sum()), outside + int((moved & ~selected).sum())
    positions = {name: where.tolist() for name, where in index.items() if len(where)}
    if not is_main():
        return
    found: dict[str, Any] = {"inside": inside, "outside": outside, "index": positions, "log": trainer.state.log_history}
    found["wanted"] = int(0.01 * sum(values.numel() for values in before.values()))
    if taken and initial is not None and world_size() == 1:
        found["error"], found["size"] = error_of_sums(taken[0], trainer, initial, batches)
    (folder / "found.json").write_text(json.dumps(found))


def watched_sums() -> list[Any]:
    """A list that gets the statistics which the callback takes."""
    taken: list[Any] = []
    collect = estimate.collect_statistics

    def collect_and_keep(*args: Any, **options: Any) -> Any:
        taken.append(collect(*args, **options))
        return taken[-1]

    estimate.collect_statistics = collect_and_keep  # type: ignore[assignment]
    return taken


def watched_completions(trainer: Any) -> list[Any]:
    """The micro-batches that plain torch shall take: a trainer's rows, or what it makes of its prompts."""
    if not hasattr(trainer, "_generate_and_score_completions"):
        rows = trainer.train_dataset
        numbers = [range(i, min(i + 2, len(rows))) for i in range(0, len(rows), 2)]
        return [trainer.data_collator([rows[i] for i in taken]) for taken in numbers]
    made: list[Any] = []
    generate = trainer._generate_and_score_completions

    def generate_and_keep(rows: Any) -> Any:
        found = generate(rows)
        if trainer.state.global_step == 0 and len(made) < 4:  # those of seven prompts, before any of the training
            made.append(copy.copy(found))
        return found

    trainer._generate_and_score_completions = generate_and_keep
    return made


def error_of_sums(stats: Any, trainer: Any, initial: nn.Module, batches: list[Any]) -> tuple[float, float]:
    """The largest differences of the sums of squares from plain torch's, relative to the largest sum, and that sum."""
    params = {info.name: dict(initial.named_parameters())[info.name] for info, _, _ in stats.layout.owned()}
    sums = {name: torch.zeros(param.numel()) for name, param in params.items()}
    trainer.current_gradient_accumulation_steps = 1
    for module in (initial, trainer.model):  # by the latter's mode a trainer tells a step from an evaluation
        module.train()
    for batch in batches:
        loss = trainer.compute_loss(initial, batch)
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for name, grad in zip(params, grads, strict=True):
            if grad is not None:
                sums[name] += grad.reshape(-1).square()
    wanted = torch.cat([sums[info.name][part.start : part.stop] for info, part, _ in stats.layout.owned()])
    return float((stats.square_sum - wanted).abs().max() / wanted.max()), float(wanted.max())


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters: ZeRO-3 has parts of them on every rank. A collective."""
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: param.detach().clone() for name, param in model.named_parameters()}


def make_chat_tokenizer() -> Any:
    """A tokenizer of bytes with a chat template that marks what the assistant says."""
    tokenizer = make_tokenizer(256)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(kind: str) -> Any:
    """A tiny Llama: a classifier for rewards, else a language model."""
    config = model_config()
    config.hidden_size, config.intermediate_size, config.head_dim, config.num_labels = 32, 48, 8, 1
    torch.manual_seed(0)
    return (LlamaForSequenceClassification if kind == "reward" else LlamaForCausalLM)(config)


def make_trainer(kind: str, folder: Path) -> Any:
    """The trainer of a kind, with a tiny model."""
    tokenizer, model = make_chat_tokenizer(), make_model(kind)
    common: dict[str, Any] = {"output_dir": str(folder), **COMMON}
    of_list = datasets.Dataset.from_list
    if kind in SFT:
        rows, options = SFT[kind]
        arguments = trl.SFTConfig(**common, **options)
        return trl.SFTTrainer(model=model, args=arguments, train_dataset=of_list(rows), processing_class=tokenizer)
    shared: dict[str, Any] = {"model": model, "processing_class": tokenizer}
    preferences, prompts, unpaired = of_list(PREFERENCES), of_list(PROMPTS), of_list(UNPAIRED)
    name, _, option = kind.partition(":")
    options: dict[str, Any]
    if name == "dpo":
        is_precomputed = option == "precompute"
        options = {"precompute_ref_log_probs": True} if is_precomputed else {"loss_type": option.split("+")}
        arguments = trl.DPOConfig(**common, **(options if option else {}))
        if is_precomputed:
            # What a rank maps of rows from a list it keeps in a folder of its own, where TRL looks for rank 0's file.
            preferences = of_file(PREFERENCES, folder)
        shared["ref_model"] = None if is_precomputed else copy.deepcopy(model)
        return trl.DPOTrainer(args=arguments, train_dataset=preferences, **shared)
    if name == "reward":
        return trl.RewardTrainer(args=trl.RewardConfig(**common), train_dataset=preferences, **shared)
    if name == "kto":
        options = {"loss_type": option} if option else {}
        reference = moved_copy(model, 0.3)  # worse than the model: else its KL, which is no less than 0, would be 0
        arguments = trl.KTOConfig(**common, **options)
        return trl.KTOTrainer(ref_model=reference, args=arguments, train_dataset=unpaired, **shared)
    if name == "distillation":
        arguments = trl.DistillationConfig(**common, **COMPLETIONS)
        return trl.DistillationTrainer(teacher_model=moved_copy(model), args=arguments, train_dataset=prompts, **shared)
    if name == "rloo":
        # Its reference is read again from where the model came from.
        model.save_pretrained(folder / "model")
        shared["model"] = LlamaForCausalLM.from_pretrained(folder / "model")
        arguments = trl.RLOOConfig(**common, **GROUPS)
        return trl.RLOOTrainer(args=arguments, reward_funcs=length_reward, train_dataset=prompts, **shared)
    if name in EXPERIMENTAL:
        prefix, options = EXPERIMENTAL[name]
        module = importlib.import_module(f"trl.experimental.{name}")
        arguments = getattr(module, f"{prefix}Config")(**common, **options)
        shared |= {"train_dataset": preferences} if name == "orpo" else {"train_dataset": prompts}
        shared |= {} if name == "orpo" else {"reward_funcs": length_reward}
        return getattr(module, f"{prefix}Trainer")(args=arguments, **shared)
    options = {"batch": {"scale_rewards": "batch"}, "": {}}.get(option, {"loss_type": option})
    arguments = trl.GRPOConfig(**common, **GROUPS, **options)
    return trl.GRPOTrainer(args=arguments, reward_funcs=length_reward, train_dataset=prompts, **shared)


def of_file(rows: list[dict[str, Any]], folder: Path) -> Any:
    """Rows that all ranks read from one file, which is there once ranks know of each other."""
    path = folder / "rows.jsonl"
    if is_main():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    barrier()
    return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))


def moved_copy(model: nn.Module, deviation: float = 0.02) -> Any:
    """A copy with other weights: a reference or a teacher of its own."""
    generator = torch.Generator().manual_seed(1)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for param in moved.parameters():
            param += deviation * torch.randn(param.shape, generator=generator)
    return moved


def length_reward(completions: list[str], **options: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


if __name__ == "__main__":
    main()
