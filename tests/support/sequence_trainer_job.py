"""A job: PIECE in transformers' Trainer whose ranks share rows (parallelism_config); for test_sequence_parallel.py.

Arguments: folder, and masked, compact or stage2. One Trainer a process: DeepSpeed makes the groups once.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DeepSpeedSequenceParallelConfig, ParallelismConfig
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments, default_data_collator

from piece_ds import PieceCallback
from piece_ds.runtime.errors import UserError
from support.engines import whole_weights
from support.jobs import Results, collect_case, finish, start
from support.oracle import SelectedAdamW, gradient_sums, score, top_k
from support.selection_cases import as_set
from support.sequence_job import ACCUMULATION, CLIP, LEARNING_RATE, RATIO, ROWS, VOCAB, WEIGHT_DECAY, make

NUM_STEPS = 2


def main() -> None:
    folder = start()
    results: Results = {}
    case = sys.argv[2]
    collect_case(results, case, lambda: refused(folder) if case == "stage2" else run(folder, 3, case))
    finish(results)


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(12)
    made = [torch.randint(1, VOCAB, (10,), generator=generator).tolist() for _ in range(12)]
    return [{"input_ids": ids, "labels": [-100] * 3 + ids[3:], "position_ids": list(range(10))} for ids in made]


class InOrder(Trainer):
    """Takes rows as they come."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)


def trainer_of(output: Path, stage: int, mode: str) -> tuple[Trainer, PieceCallback]:
    arguments = TrainingArguments(
        output_dir=str(output),
        deepspeed={
            "zero_optimization": {"stage": stage},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        },
        parallelism_config=ParallelismConfig(
            sp_backend="deepspeed",
            sp_size=2,
            sp_handler=DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"),
        ),
        use_cpu=True,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=NUM_STEPS,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = InOrder(model=make("llama"), args=arguments, train_dataset=rows(), data_collator=default_data_collator)
    callback = PieceCallback(trainer, ratio=RATIO, importance_batch_size=ROWS, update_mode=mode)
    trainer.add_callback(callback)
    return trainer, callback


def run(output: Path, stage: int, mode: str) -> dict[str, Any]:
    """Mask, norms and weights against those of whole rows in plain torch."""
    trainer, callback = trainer_of(output, stage, mode)
    trainer.train()
    assert callback.mask is not None
    whole = callback.mask.whole()
    final, log = whole_weights(trainer.model_wrapped), [e for e in trainer.state.log_history if "grad_norm" in e]

    # The mask.
    model = make("llama").eval()
    batches = [default_data_collator(rows()[b : b + ROWS]) for b in range(0, len(rows()), ROWS)]
    sums, squares = gradient_sums(model, batches, "model.embed_tokens.weight")
    expected = top_k(score("piece-s", sums, squares), callback.mask.num_selected)

    # The steps: micro-batch after micro-batch, each of them on all ranks.
    decays = trainer.get_decay_parameter_names(model)
    optimizer = SelectedAdamW(
        model,
        {name: index.long() for name, index in whole.items()},
        LEARNING_RATE,
        lambda name: WEIGHT_DECAY if name in decays else 0.0,
        CLIP,
    )
    norms = [optimizer.step(batches[ACCUMULATION * step : ACCUMULATION * (step + 1)]) for step in range(NUM_STEPS)]
    before = dict(make("llama").named_parameters())
    largest, worst, moved = 0.0, 0.0, 0
    for name, param in model.named_parameters():
        start_, want = before[name].detach().reshape(-1), param.detach().reshape(-1)
        chosen = torch.zeros(want.numel(), dtype=torch.bool)
        chosen[whole.get(name, torch.zeros(0)).long()] = True
        moved += int((final[name] != start_)[~chosen].sum())
        if chosen.any():
            largest = max(largest, float((want - start_)[chosen].abs().max()))
            worst = max(worst, float((want - final[name])[chosen].abs().max()))
    return {
        "selected": callback.mask.num_selected,
        "other": len(as_set(whole) - expected),
        "moved": moved,
        "off": worst / largest,
        "norm": max(abs(e["grad_norm"] - n) / n for e, n in zip(log, norms, strict=True)),
    }


def refused(output: Path) -> dict[str, Any]:
    """At ZeRO-2 the trainer's loss is not that of whole rows."""
    trainer, _ = trainer_of(output, 2, "masked")
    try:
        trainer.train()
    except UserError as error:
        return {"message": str(error), "written": [path.name for path in output.rglob("*.safetensors")]}
    return {"message": "", "written": []}


if __name__ == "__main__":
    main()
