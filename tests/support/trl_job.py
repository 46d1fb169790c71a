"""A script as a TRL user writes it, started with plain python or by a launcher: a trainer, two steps."""

import copy
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
from piece_ds.runtime.distributed import is_main
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
    "dft": (CHAT, {"assistant_only_loss": True, "loss_type": "dft"}),
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
    before = whole_weights(trainer.model)
    options = GENERAL if mode == "general" else {"update_mode": mode}
    try:
        callback = PieceCallback(trainer, ratio=0.01, importance_batch_size=2, **options)
    except UserError as error:
        (folder / "found.json").write_text(json.dumps({"refused": str(error)}))
        return
    trainer.add_callback(callback)
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
    (folder / "found.json").write_text(
        json.dumps({"inside": inside, "outside": outside, "index": positions, "log": trainer.state.log_history})
    )


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
    if kind == "dpo":
        reference = copy.deepcopy(model)
        arguments = trl.DPOConfig(**common)
        return trl.DPOTrainer(ref_model=reference, args=arguments, train_dataset=of_list(PREFERENCES), **shared)
    if kind == "reward":
        return trl.RewardTrainer(args=trl.RewardConfig(**common), train_dataset=of_list(PREFERENCES), **shared)
    # Long enough for some to end before others: at equal lengths the loss of a group is 0, whatever was drawn.
    arguments = trl.GRPOConfig(**common, num_generations=2, max_completion_length=64)
    return trl.GRPOTrainer(args=arguments, reward_funcs=length_reward, train_dataset=of_list(PROMPTS), **shared)


def length_reward(completions: list[str], **options: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


if __name__ == "__main__":
    main()
