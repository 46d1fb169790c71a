"""PIECE in a transformers Trainer: one line more, and only the most important 1 % of the weights train."""

import sys
from tempfile import mkdtemp

from small_model import collate, copy_of, count_changed, make_model, make_rows, on_one_process
from transformers import Trainer, TrainingArguments


def main(output_dir: str) -> None:
    on_one_process()
    from piece_ds import PieceCallback

    # A Trainer as you have it, with a DeepSpeed configuration.
    arguments = TrainingArguments(
        output_dir=output_dir,
        deepspeed={
            "zero_optimization": {"stage": 2},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        },
        per_device_train_batch_size=8,
        max_steps=20,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = make_model()
    before = copy_of(model)
    trainer = Trainer(model=model, args=arguments, train_dataset=make_rows(), data_collator=collate)

    # The one line: importance is estimated on the trainer's data when training begins.
    callback = PieceCallback(trainer, method="piece-s", ratio=0.01, update_mode="masked")
    trainer.add_callback(callback)
    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    print(f"{count_changed(before, model)} weights changed, {callback.mask.num_selected} were selected")
    print(f"the mask is in {output_dir}/mask.safetensors")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else mkdtemp())
