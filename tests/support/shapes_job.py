"""A job: statistics, masked and compact steps of models that are no plain decoder, each against plain torch.

Arguments: folder, and names of cases; none means all of them.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from piece_ds import PieceCallback, attach, estimate_mask, prepare_compact
from piece_ds.methods.estimate import select
from piece_ds.runtime.errors import UserError
from piece_ds.zero.statistics import collect_statistics
from support.engines import DTYPES, FP32_ACCUMULATION, Setup, adamw, make_engine, whole_weights
from support.jobs import Results, collect_case, finish, start
from support.models import cast_parameters
from support.oracle import SelectedAdamW, gradient_sums, score, top_k
from support.selection_cases import as_set
from support.shapes import ADDED_ROWS, FIRST_ADDED, RECURRENT, SHAPES, embedding_of, make_shape, shape_batches
from support.statistics_job import whole

RATIO, NUM_BATCHES = 0.05, 5
ACCUMULATION, NUM_STEPS, CLIP, LEARNING_RATE, WEIGHT_DECAY = 2, 2, 0.02, 1e-2, 0.1
STAGES = (0, 2, 3)

CHECKPOINTED = (*RECURRENT, "t5", "frozen-parts", "listed-experts")

# Name of the case -> (shape, setup of DeepSpeed, way of checkpointing).
CASES = {f"{shape}-stage{stage}": (shape, Setup(stage), "") for shape in SHAPES for stage in STAGES}
CASES |= {f"{shape}-stage3-checkpointed": (shape, Setup(3), "non-reentrant") for shape in CHECKPOINTED}
CASES |= {
    f"{shape}-bf16-stage{stage}": (shape, Setup(stage, "bf16", config=FP32_ACCUMULATION), "")
    for shape, stage in (("mamba2", 2), ("falcon_h1", 3), ("qwen3_next", 2), ("recurrent_gemma", 3), ("t5", 2))
}


def main() -> None:
    folder = start()
    results: Results = {}
    for name in sys.argv[2:] or CASES:
        collect_case(results, name, lambda name=name: run_case(*CASES[name]))  # type: ignore[misc]
    for mode in ("masked", "compact"):
        collect_case(results, f"trainer-{mode}", lambda mode=mode: run_trainer(folder / mode, mode))  # type: ignore[misc]
    finish(results)


def run_trainer(output: Path, mode: str) -> dict[str, Any]:
    """An encoder-decoder in transformers' Trainer: its mask against plain torch, and what moved."""
    generator = torch.Generator().manual_seed(4)
    made = [torch.randint(5, 56, (2, 8), generator=generator).tolist() for _ in range(8)]
    rows = [{"input_ids": source, "labels": answer} for source, answer in made]
    arguments = TrainingArguments(
        output_dir=str(output),
        deepspeed={"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"},
        use_cpu=True,
        per_device_train_batch_size=2,
        max_steps=2,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=make_shape("t5"), args=arguments, train_dataset=rows, data_collator=default_data_collator)
    callback = PieceCallback(trainer, ratio=RATIO, importance_batch_size=2, update_mode=mode)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.mask is not None

    # The same rows, two at a time, in plain torch.
    model = make_shape("t5")
    batches = [default_data_collator(rows[b : b + 2]) for b in range(0, len(rows), 2)]
    sums, squares = gradient_sums(model, batches, embedding_of(model))
    mask, weights = as_set(callback.mask.whole()), whole_weights(trainer.model_wrapped)
    before = {name: param.detach().reshape(-1) for name, param in make_shape("t5").named_parameters()}
    changed = {(n, i) for n in before for i in (before[n] != weights[n]).nonzero().view(-1).tolist()}
    return {
        "k": len(mask),
        "other": len(mask - top_k(score("piece-s", sums, squares), len(mask))),
        "moved": len(changed - mask),
        "trained": len(changed & mask),
    }


def run_case(shape: str, setup: Setup, checkpointing: str) -> dict[str, Any]:
    """How far statistics, mask and steps of both modes are from plain torch; no unselected weight may move."""
    model = cast_parameters(make_shape(shape), DTYPES[setup.dtype])
    embedding = embedding_of(model)
    left_out = None if shape in ADDED_ROWS else embedding
    sums, squares = gradient_sums(model, shape_batches(shape, NUM_BATCHES), left_out)
    k = max(1, int(RATIO * sum(param.numel() for param in model.parameters())))
    scores = score("piece-s", sums, squares)
    if shape in ADDED_ROWS:
        first = FIRST_ADDED * model.get_input_embeddings().weight.shape[1]
        scores[embedding][:first] = -1.0
        sums[embedding], squares[embedding] = sums[embedding][first:], squares[embedding][first:]
    expected = top_k(scores, k)
    result: dict[str, Any] = {"k": k}
    for mode in ("masked", "compact"):
        try:
            with mock.patch("piece_ds.update.gradients.max_density", return_value=1.0):
                found = run_mode(shape, setup, checkpointing, mode)
        except UserError as error:
            result[f"{mode} refused"] = str(error)
            continue
        for which, want in (("sums", sums), ("squares", squares)):
            assert found[which].keys() == want.keys()
            errors = {n: abs(found[which][n] - want[n]).max() / (abs(want[n]).max() or 1.0) for n in want}
            worst = max(errors, key=lambda name: errors[name])
            result[f"{mode} {which}"] = (float(errors[worst]), worst)
        mask = as_set(found["index"])
        result[f"{mode} selected"] = len(mask)
        result[f"{mode} other"] = len(mask - expected)
        result |= {f"{mode} {key}": value for key, value in compare(shape, setup, found).items()}
    return result


def run_mode(shape: str, setup: Setup, checkpointing: str, mode: str) -> dict[str, Any]:
    model = make_shape(shape)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if mode == "compact":
        prepare_compact(model, RATIO)
    engine = make_engine(model, setup, adamw(model, LEARNING_RATE, WEIGHT_DECAY), ACCUMULATION, CLIP)
    initial = whole_weights(engine)
    stats = collect_statistics(engine, shape_batches(shape, NUM_BATCHES))
    mask = estimate_mask(engine, [], ratio=RATIO, layout=stats.layout, stats=stats)
    assert as_set(mask.whole()) == as_set(select(stats.layout, "piece-s", RATIO, stats).whole())
    attach(engine, mask)
    norms = []
    for step in range(NUM_STEPS):
        for batch in batches_of(shape, step)[dist.get_rank() :: dist.get_world_size()]:
            engine.backward(engine(**batch).loss)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    result = {"initial": initial, "final": whole_weights(engine), "index": mask.whole(), "norms": norms}
    result |= {"sums": whole(stats, "grad_sum"), "squares": whole(stats, "square_sum")}
    engine.destroy()
    return result


def batches_of(shape: str, step: int) -> list[dict[str, Tensor]]:
    """All ranks' micro-batches of a step."""
    per_step = ACCUMULATION * dist.get_world_size()
    return shape_batches(shape, per_step * NUM_STEPS)[per_step * step : per_step * (step + 1)]


def compare(shape: str, setup: Setup, found: dict[str, Any]) -> dict[str, Any]:
    """The steps of plain torch on the same selection."""
    model = cast_parameters(make_shape(shape), DTYPES[setup.dtype])
    index = {name: positions.long() for name, positions in found["index"].items() if positions.numel()}
    optimizer = SelectedAdamW(model, index, LEARNING_RATE, lambda _: WEIGHT_DECAY, CLIP)
    norms = [optimizer.step(batches_of(shape, step)) for step in range(NUM_STEPS)]
    largest, worst, moved, trained = 0.0, 0.0, 0, 0
    for name, param in model.named_parameters():
        before, after, want = found["initial"][name], found["final"][name], param.detach().reshape(-1)
        chosen = torch.zeros(before.numel(), dtype=torch.bool)
        chosen[index.get(name, torch.zeros(0).long())] = True
        moved += int((before != after)[~chosen].sum())
        trained += int((before != after)[chosen].sum())
        if chosen.any():
            largest = max(largest, float((want - before)[chosen].abs().max()))
            worst = max(worst, float((want - after)[chosen].abs().max()))
    norm_error = max(abs(a - b) / b for a, b in zip(found["norms"], norms, strict=True))
    return {"moved": moved, "trained": trained, "off": worst / largest, "norm": norm_error}


if __name__ == "__main__":
    main()
