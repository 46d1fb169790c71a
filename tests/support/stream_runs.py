"""The flags of the end-to-end runs: a stream, short single tasks, and every variant that one job runs."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from support.launches import CONFIGS, write_rows

NUM_STEPS, NUM_RANKS, BATCH_SIZE, ACCUMULATION = 4, 2, 2, 2
ROWS_PER_STEP = NUM_RANKS * BATCH_SIZE * ACCUMULATION
RATIO, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 0.05, 1e-2, 0.1, 0.5

TRAINING = {
    "mask_ratio": RATIO,
    "per_device_train_batch_size": BATCH_SIZE,
    "gradient_accumulation_steps": ACCUMULATION,
    "max_steps": NUM_STEPS,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "weight_decay": WEIGHT_DECAY,
    "max_grad_norm": MAX_GRAD_NORM,
    "max_new_tokens_text": 8,
    "train_sampling_strategy": "sequential",
    "save_model": "each",
    "logging_steps": 1,
}


@dataclass(frozen=True)
class Material:
    """A folder with the model and the data of all runs; runs write below it too."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def tasks(self) -> Path:
        return self.root / "tasks"

    def out(self, name: str) -> Path:
        return self.root / "out" / name

    def stream_flags(self, name: str, **changes: object) -> list[str]:
        """Flags of a stream of both tasks into out(name); a change to None drops a flag."""
        flags: dict[str, object] = {
            "deepspeed": CONFIGS / "zero3.json",
            "model_name_or_path": self.base,
            "task_dir": self.tasks,
            "tasks": "letter,text",
            **TRAINING,
            "output_dir": self.out(name),
        }
        return as_flags({**flags, **changes})

    def short_flags(self, name: str, **changes: object) -> list[str]:
        """Flags of one step on one task into out(name)."""
        single = {"task_dir": None, "tasks": None, "train_file": self.tasks / "letter" / "train.json", "max_steps": 1}
        return self.stream_flags(name, **{**single, "max_eval_samples": 2, **changes})


def as_flags(values: dict[str, object]) -> list[str]:
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def variant_flags(material: Material) -> dict[str, list[str]]:
    """Name -> flags of short runs: one of each kind of thing."""
    short, root = material.short_flags, material.root
    _write_given_mask(root / "given.safetensors", material.base)
    statistics = {"statistics_file": root / "statistics", "importance_batch_size": 8}
    return {
        "again": material.stream_flags(
            "again", general_file=root / "general.jsonl", report_to="recorder", delta_every=3
        ),
        "seqft": short("seqft", method="seqft"),
        "given": short("given", mask_file=root / "given.safetensors"),
        "statistics-write": short("statistics-write", **statistics),
        "statistics-read": short("statistics-read", **statistics, method="piece-f"),
        "statistics-other": short("statistics-other", importance_batch_size=8, method="piece-f"),
        "bf16": short("bf16", model_name_or_path=root / "base_bf16", max_steps=2, delta_every=1),
        "tokens": short("tokens", train_file=_write_tokens(material)),
        "words": short("words"),
        "masked": short("masked", update_mode="masked", delta_every=1, delta_coding="smallest"),
    }


def slow_variant_flags(material: Material) -> dict[str, list[str]]:
    """Name -> flags of every DeepSpeed configuration, method and option, and of a long run."""
    short, root = material.short_flags, material.root
    statistics = {"statistics_file": root / "statistics-slow"}
    few = {"max_steps": 1, "max_eval_samples": 2}
    runs = {path.stem: short(path.stem, deepspeed=path, max_steps=2) for path in sorted(CONFIGS.glob("*.json"))}
    runs |= {method: short(method, method=method) for method in ("piece-s", "piece-f", "random", "magnitude")}
    runs |= {budget: short(budget, budget=budget) for budget in ("layer", "tensor")}
    runs |= {
        f"save-{mode}": material.stream_flags(f"save-{mode}", **few, save_model=mode)
        for mode in ("last", "each", "never")
    }
    return runs | {
        "ahead": material.stream_flags(
            "ahead",
            **few,
            save_model="never",
            forward_transfer=True,
            sample=True,
            scoring="authors",
            scorers="letter=loss",
        ),
        "statistics-first": short("statistics-first", **statistics),
        "statistics-ratio": short("statistics-ratio", **statistics, method="piece-f", mask_ratio=0.01),
        "evaluated": short(
            "evaluated",
            max_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            eval_file=material.tasks / "letter" / "eval.json",
        ),
        "smaller-step": short(
            "smaller-step", gradient_accumulation_steps=3, max_steps=3, incomplete_accumulation="smaller_step"
        ),
        "long": long_flags(material, "long"),
    }


def long_flags(material: Material, name: str, **changes: object) -> list[str]:
    """A stream of shuffled data and a falling rate, long enough to be interrupted."""
    long = {
        "max_steps": 12,
        "importance_batch_size": 1,
        "train_sampling_strategy": None,
        "lr_scheduler_type": "linear",
        "max_eval_samples": 2,
        "save_model": "last",
        "delta_every": 5,
    }
    return material.stream_flags(name, **{**long, **changes})


def _write_given_mask(path: Path, base: Path) -> None:
    """A mask made by hand, of the embedding and one projection, with the least metadata that the format asks for."""
    embedding, projection = torch.zeros(259 * 32 // 8, dtype=torch.uint8), torch.zeros(32 * 32 // 8, dtype=torch.uint8)
    embedding[::3], projection[5] = 0b00010001, 0b10000000
    selected = 2 * len(embedding[::3]) + 1
    total = sum(values.numel() for values in load_file(base / "model.safetensors").values())
    shapes = {"model.embed_tokens.weight": [259, 32], "model.layers.1.self_attn.q_proj.weight": [32, 32]}
    metadata = {
        "format": "piece-mask",
        "version": "1",
        "method": "hand",
        "ratio": "0.1",
        "selected": str(selected),
        "total": str(total),
        "shapes": json.dumps(shapes),
    }
    save_file(dict(zip(shapes, (embedding, projection), strict=True)), path, metadata)


def _write_tokens(material: Material) -> Path:
    """The rows of task letter as token ids, which must give what the words give."""
    tokenizer = AutoTokenizer.from_pretrained(material.base)
    rows = []
    for row in json.loads((material.tasks / "letter" / "train.json").read_text()):
        prompt = [1, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], 2]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return write_rows(material.root / "tokens" / "train.jsonl", rows)
