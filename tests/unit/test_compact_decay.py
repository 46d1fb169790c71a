"""In compact mode weight decay and rates are those that a trainer gives by the names of weights, or it is said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from support.models import make_model
from torch import nn
from transformers import Trainer, TrainingArguments

from piece_ds.state.selected_values import PARAMETER_NAME, selected_values
from piece_ds.training.compact_trainer import prepare_trainer


class DecaysByName(Trainer):
    chosen = "q_proj"

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if self.chosen in name]


class RateByLayer(Trainer):
    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        return self.optimizer


def made(kind: type[Trainer], folder: Path) -> Trainer:
    arguments = TrainingArguments(str(folder), use_cpu=True, report_to=[], weight_decay=0.5)
    return kind(model=make_model("llama"), args=arguments)


@pytest.mark.parametrize("chosen", ["q_proj", "nothing of this name"])
def test_the_values_have_the_decay_whatever_names_a_trainer_chooses(tmp_path: Path, chosen: str) -> None:
    trainer = cast(DecaysByName, made(DecaysByName, tmp_path))
    trainer.chosen = chosen
    expected = set(trainer.get_decay_parameter_names(trainer.model))
    undo = prepare_trainer(trainer, lambda model: 7, save_full=False)
    values = selected_values(cast(nn.Module, trainer.model))
    assert values is not None
    assert values.decays == expected
    (group,) = [group for group in trainer.create_optimizer().param_groups if group["params"]]
    assert (group["weight_decay"], [id(param) for param in group["params"]]) == (0.5, [id(values.values)])
    undo()
    assert PARAMETER_NAME not in trainer.get_decay_parameter_names(trainer.model)


@pytest.mark.parametrize(("kind", "is_said"), [(Trainer, False), (DecaysByName, False), (RateByLayer, True)])
def test_an_optimizer_of_the_trainers_own_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: type[Trainer], is_said: bool
) -> None:
    prepare_trainer(made(kind, tmp_path), lambda model: 7, save_full=True)
    assert ("RateByLayer makes its optimizer itself" in caplog.text) == is_said


def test_what_is_no_trainer_by_inheritance_is_prepared_too() -> None:
    trainer = SimpleNamespace(model=make_model("llama"), optimizer=None, get_decay_parameter_names=lambda model: [])
    prepare_trainer(cast(Any, trainer), lambda model: 7, save_full=True)
    assert trainer.get_decay_parameter_names(trainer.model) == [PARAMETER_NAME]
