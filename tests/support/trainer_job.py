"""A job: PIECE in transformers' Trainer, and in a plain DeepSpeed loop; results for test_user_loops.py."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, default_data_collator

from piece_ds import PieceCallback, attach, estimate_mask, prepare_compact
from support.engines import Setup, adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import make_micro_batches, make_model
from support.update_cases import batches_of
from support.update_job import run_step

NUM_STEPS, SAVED_STEP = 6, 3


def rows() -> list[dict[str, list[int]]]:
    return _drawn(seed=2, num_rows=20)


def _drawn(seed: int, num_rows: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(1, 97, (9,), generator=generator).tolist() for _ in range(num_rows)]
    return [{"input_ids": ids, "labels": ids} for ids in made]


GENERAL = {
    "method": "piece-ratio",
    "step_scale": "general",
    "general_text": _drawn(seed=5, num_rows=7),
    "general_replay": 0.5,
    "general_kl": 1.0,
}
# (stage, options of PieceCallback) of the Trainers.
TRAINERS: dict[str, tuple[int, dict[str, Any]]] = {
    "trainer-stage2": (2, {"update_mode": "masked", "delta_every": 4}),
    "trainer-stage3": (3, {"update_mode": "masked"}),
    "trainer-compact-stage0": (0, {}),
    "trainer-compact-stage3": (3, {"update_mode": "compact", "delta_every": 2, "delta_coding": "smallest"}),
    "trainer-compact-full-stage2": (2, {"update_mode": "compact", "save_full": True}),
    "trainer-general-stage2": (2, {"update_mode": "masked", **GENERAL}),
    # The model writes the text, and what it wrote is read again when the run is resumed.
    "trainer-compact-general-stage3": (3, {"recipe": "mask", "ratio": 0.02, "general_replay": 0.5, "general_kl": 1.0}),
}


def main() -> None:
    folder = start()
    results: Results = {}
    for name, (stage, options) in TRAINERS.items():
        collect_case(results, name, partial(train_and_resume, folder / name, stage, options))
    for stage in (0, 1, 2, 3):
        collect_case(results, f"loop-stage{stage}", lambda stage=stage: plain_loop(stage))  # type: ignore[misc]
    collect_case(results, "loop-compact-stage1", lambda: compact_loop(1))
    finish(results)


def train_and_resume(output: Path, stage: int, options: dict[str, Any]) -> dict[str, Any]:
    """Six steps; then the last three again from the checkpoint, with a fresh model, engine and optimizer."""
    initial, final, index, log = train(output, stage, options, resume_from=None)
    checkpoint = output / f"checkpoint-{SAVED_STEP}"
    _, resumed, resumed_index, resumed_log = train(output, stage, options, resume_from=checkpoint)
    return {
        "initial": initial,
        "final": final,
        "index": index,
        "log": log,
        "resumed": resumed,
        "resumed_index": resumed_index,
        "resumed_log": resumed_log,
        "mask_file": str(output / "mask.safetensors"),
        "model_file": str(output / "model" / "model.safetensors"),
        "checkpoint_bytes": {
            str(path.relative_to(checkpoint)): path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()
        },
    }


def train(output: Path, stage: int, options: dict[str, Any], resume_from: Path | None) -> tuple:
    arguments = TrainingArguments(
        output_dir=str(output),
        deepspeed={
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        },
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=NUM_STEPS,
        save_steps=SAVED_STEP,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        max_grad_norm=0.05,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        seed=3,
    )
    model = make_model("llama", dropout=0.1)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        data_collator=default_data_collator,
        processing_class=word_tokenizer(97) if "recipe" in options else None,
    )
    method = {} if "recipe" in options else {"method": "piece-s", "ratio": 0.02}
    callback = PieceCallback(trainer, **{**method, "importance_batch_size": 3, **options})
    trainer.add_callback(callback)
    initial = {name: p.detach().reshape(-1).clone() for name, p in make_model("llama").named_parameters()}
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    assert callback.mask is not None
    weights = whole_weights(trainer.model_wrapped)
    trainer.save_model(str(output / "model"))
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return initial, weights, callback.mask.whole(), log


def word_tokenizer(num_words: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of so many words; the first three are padding, beginning and end."""
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(num_words)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def plain_loop(stage: int) -> dict[str, Any]:
    """The two calls that PIECE is, with a user's own engine and loop."""
    model = make_model("llama")
    engine = make_engine(model, Setup(stage), adamw(model), accumulation=2, clip=0.02)
    initial = whole_weights(engine)
    mask = estimate_mask(engine, make_micro_batches(), method="piece-s", ratio=0.01)
    attach(engine, mask)
    for step in range(3):
        run_step(engine, batches_of(step))
    result = {"initial": initial, "final": whole_weights(engine), "index": mask.whole()}
    engine.destroy()
    return result


def compact_loop(stage: int) -> dict[str, Any]:
    """The same with one call more, before the engine is made."""
    model = make_model("llama")
    prepare_compact(model, ratio=0.01)
    engine = make_engine(model, Setup(stage), adamw(model), accumulation=2, clip=0.02)
    initial = whole_weights(engine)
    mask = estimate_mask(engine, make_micro_batches(), method="piece-s", ratio=0.01)
    update = attach(engine, mask)
    for step in range(3):
        run_step(engine, batches_of(step))
    update.detach()
    result = {"initial": initial, "final": whole_weights(engine), "index": mask.whole()}
    engine.destroy()
    return result


if __name__ == "__main__":
    main()
    sys.exit(0)
