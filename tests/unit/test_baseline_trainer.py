"""What a method without a mask adds to the loss: a part of the sum over answer tokens, divided as that sum is."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.models import make_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments, default_data_collator

from piece_ds.config.method_arguments import BaselineArguments
from piece_ds.methods.baseline import Baseline
from piece_ds.training.trainer import BaselineTrainer

ROW = {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8], "note": 3.0}


class Noting(Baseline):
    """Adds the rows' notes, which the model does not know."""

    def take(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in inputs.items() if name != "note"}

    def extra_loss(self, inputs: dict[str, Tensor], outputs: Any) -> Tensor:
        assert outputs.logits.shape[:2] == inputs["labels"].shape
        return inputs["note"].sum()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_in_step", [None, 9])
def test_an_addition_is_divided_as_the_answer_tokens_losses_are(
    num_in_step: int | None, num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tokens of the whole step, of which a rank has a part; without their number, by the micro-batch's."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    context: Any = SimpleNamespace()
    trainer = BaselineTrainer(
        Noting(BaselineArguments()),
        context,
        model=make_model("llama"),
        args=arguments,
        train_dataset=[ROW] * 2,
        data_collator=default_data_collator,
    )
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", num_ranks)
    batch = default_data_collator([ROW, ROW])
    model: Any = trainer.model.eval()
    logits = model(input_ids=batch["input_ids"]).logits
    total = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum")
    divisor = 6 if num_in_step is None else num_in_step / num_ranks
    number = None if num_in_step is None else torch.tensor(num_in_step)
    for trains, extra in ((True, 6.0), (False, 0.0)):
        model.train(trains)
        loss, outputs = trainer.compute_loss(model, dict(batch), True, number)
        torch.testing.assert_close(loss, (total + extra) / divisor)
        assert outputs.logits.shape == logits.shape
        assert torch.equal(trainer.compute_loss(model, dict(batch), num_items_in_batch=number), loss)
