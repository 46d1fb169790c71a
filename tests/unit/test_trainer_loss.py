"""A trainer's micro-batches for the statistics pass: its own collator, columns and loss, and its notes as they were."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, gather, gather_object
from support.models import make_model
from torch import Tensor
from transformers import Trainer, TrainingArguments, default_data_collator

from piece_ds.runtime.errors import UserError
from piece_ds.training.epoch_order import EpochOrder
from piece_ds.training.trainer_checks import check_importance
from piece_ds.training.trainer_loss import notes_kept, trainer_micro_batches
from piece_ds.zero.random_draws import DrawWatch

ROWS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "note": 3}] * 5


def trainer_of(
    folder: Path, rows: Any, kind: type[Trainer] = Trainer, max_steps: int = -1, seed: int = 42, **options: Any
) -> Trainer:
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], max_steps=max_steps, seed=seed)
    model = make_model("llama")
    return kind(model=model, args=arguments, train_dataset=rows, data_collator=default_data_collator, **options)


class Doubled(Trainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * model(**inputs).loss


def test_rows_are_collated_as_the_trainers_own_loader_does(tmp_path: Path) -> None:
    for rows in (ROWS, datasets.Dataset.from_list(ROWS)):
        batches = trainer_micro_batches(trainer_of(tmp_path, rows), 2)
        assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
        assert set(batches[0]) == {"input_ids", "labels"}
        assert batches.loss_of is None


def test_a_trainers_own_loss_is_the_one_taken(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ROWS, Doubled)
    batches = trainer_micro_batches(trainer, 2)
    assert batches.loss_of is not None
    plain = trainer.model(**batches[0]).loss
    assert torch.equal(batches.loss_of(trainer.model, batches[0]), 2 * plain)
    own = trainer_of(
        tmp_path, ROWS, compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum()
    )
    batches = trainer_micro_batches(own, 2)
    assert batches.loss_of is not None
    assert torch.equal(batches.loss_of(own.model, batches[0]), own.model(**batches[0]).logits.sum())


def test_a_loss_set_on_one_trainer_is_the_one_taken(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ROWS)
    trainer.compute_loss = lambda model, inputs, **others: 2 * model(**inputs).loss
    batches = trainer_micro_batches(trainer, 2)
    assert batches.loss_of is not None
    plain = trainer.model(**batches[0]).loss
    assert torch.equal(batches.loss_of(trainer.model, batches[0]), 2 * plain)


def test_label_smoothing_is_a_loss_of_the_trainers_own(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, ROWS)
    arguments = replace(trainer.args, label_smoothing_factor=0.25)
    smoothing = Trainer(model=trainer.model, args=arguments, train_dataset=ROWS, data_collator=default_data_collator)
    batches = trainer_micro_batches(smoothing, 2)
    assert batches.loss_of is not None
    log_probs = smoothing.model(**batches[0]).logits[:, :-1].log_softmax(-1)
    likely = log_probs.gather(-1, batches[0]["labels"][:, 1:, None]).mean()
    wanted = -(0.75 * likely + 0.25 * log_probs.mean())
    torch.testing.assert_close(batches.loss_of(smoothing.model, batches[0]), wanted)
    batch = batches[0]  # twice of the same, as the pass may: the Trainer takes the labels out of what it is given
    assert torch.equal(batches.loss_of(smoothing.model, batch), batches.loss_of(smoothing.model, batch))


def test_what_a_trainer_makes_of_its_batches_before_the_loss_is_made_here_too(tmp_path: Path) -> None:
    class Preparing(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            inputs = super()._prepare_inputs(inputs)
            labels = inputs.pop("labels")
            return {**inputs, "labels": labels.masked_fill(labels == 6, -100)}

    trainer = trainer_of(tmp_path, ROWS, Preparing)
    batches = trainer_micro_batches(trainer, 2)
    assert batches.loss_of is not None
    batch = batches[0]
    wanted = trainer.model(input_ids=batch["input_ids"], labels=batch["labels"].masked_fill(batch["labels"] == 6, -100))
    for _ in range(2):
        assert torch.equal(batches.loss_of(trainer.model, batch), wanted.loss)


def test_a_trainer_of_trl_that_makes_batches_or_loss_while_it_trains_is_refused(tmp_path: Path) -> None:
    """By where its methods are from: a script's own step or preparation of batches is no harm."""

    def kind_of(module: str, **methods: Any) -> type[Trainer]:
        def method(self: Any, *args: Any, **options: Any) -> None: ...

        method.__module__ = module
        return type("Some", (Trainer,), {name: method if own is None else own for name, own in methods.items()})

    def loss(self: Any, *args: Any, **options: Any) -> Tensor:
        return torch.zeros(())

    refused: tuple[dict[str, Any], ...] = (
        {"training_step": None},
        {"_prepare_inputs": None, "compute_loss": loss},
        {"_inner_training_loop": None},
    )
    for methods in refused:
        wanted = f"Some makes its batches .* while it trains .{next(iter(methods))}.*mask_file"
        trainer = trainer_of(tmp_path, ROWS, kind_of("trl.trainer.some", **methods))
        with pytest.raises(UserError, match=wanted):
            check_importance(trainer, "piece-s")
        check_importance(trainer, "magnitude")
        check_importance(trainer_of(tmp_path, ROWS, kind_of("mine", **methods)), "piece-s")
    for methods in (
        {"training_step": None, "compute_loss": loss},
        {"_prepare_inputs": None, "compute_loss": loss, "_generate_and_score_completions": loss},
    ):
        check_importance(trainer_of(tmp_path, ROWS, kind_of("trl.trainer.some", **methods)), "piece-s")


def test_completions_of_a_micro_batch_are_drawn_once(tmp_path: Path) -> None:
    """The pass asks twice for the loss of its first micro-batch: other completions would be taken for a random loss."""
    calls: list[int] = []

    class Generating(Trainer):
        num_generations = 2

        def _generate_and_score_completions(self, prompts: list[Any]) -> dict[str, Any]:
            calls.append(len(prompts))
            return {"input_ids": torch.randint(0, 9, (len(prompts), 5))}

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return inputs.pop("input_ids").float().mean()

    trainer = trainer_of(tmp_path, ROWS, Generating)
    trainer.data_collator = list  # as TRL's: prompts stay rows
    batches = trainer_micro_batches(trainer, 2)
    assert batches.loss_of is not None
    first, second = batches[0], batches[1]
    losses = [batches.loss_of(trainer.model, batch) for batch in (first, first, second, second, first)]
    assert calls == [4, 4, 4]
    assert losses[0] == losses[1]
    assert losses[2] == losses[3] != losses[0]
    assert losses[4] == losses[0]  # the same completions again: the micro-batch decides, whoever takes it


def test_what_is_drawn_depends_on_the_seed_and_the_micro_batch_alone(tmp_path: Path) -> None:
    """Not on what was drawn before, by this rank or for another micro-batch; and it leaves no trace."""

    class Generating(Trainer):
        def _generate_and_score_completions(self, prompts: list[Any]) -> dict[str, Any]:
            drawn = torch.rand(len(prompts)) + random.random() + float(np.random.rand())
            return {"input_ids": drawn}

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return inputs["input_ids"].mean()

    def losses(order: list[int], seed: int) -> dict[int, float]:
        trainer = trainer_of(tmp_path, ROWS, Generating, seed=seed)
        trainer.data_collator = list
        batches = trainer_micro_batches(trainer, 2)
        assert batches.loss_of is not None
        torch.manual_seed(len(order))
        random.seed(len(order))
        watch = DrawWatch("cpu")
        found = {b: float(batches.loss_of(trainer.model, batches[b])) for b in order}
        assert not watch.drew()
        return found

    whole = losses([0, 1, 2], seed=3)
    assert losses([2, 0], seed=3) == {2: whole[2], 0: whole[0]}
    assert len({*whole.values(), *losses([0, 1, 2], seed=4).values()}) == 6


class Gathering(Trainer):
    """What TRL's losses do: KTO takes the mean of a figure over all ranks, GRPO its own rows of all ranks' rewards."""

    num_generations = 1

    def _generate_and_score_completions(self, prompts: list[Any]) -> dict[str, Any]:
        all_rewards = gather(torch.arange(1.0, 1 + len(prompts)))
        own = slice(self.accelerator.process_index * len(prompts), (self.accelerator.process_index + 1) * len(prompts))
        return {"rewards": all_rewards[own], "total": self.accelerator.gather(all_rewards.sum()).sum()}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        mean = self.accelerator.reduce(self.accelerator.gather_for_metrics(inputs["rewards"].mean()).mean())
        assert gather_object(["text"]) == ["text"]
        return mean * inputs["total"] / self.accelerator.num_processes


def test_a_loss_holds_nothing_of_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no group here: whatever is gathered from another rank fails."""
    trainer = trainer_of(tmp_path, ROWS, Gathering)
    trainer.data_collator = list
    batches = trainer_micro_batches(trainer, 2)
    assert batches.loss_of is not None
    settings = {"num_processes": 2, "process_index": 1, "distributed_type": DistributedType.MULTI_CPU}
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        for name, value in settings.items():
            monkeypatch.setitem(state, name, value)
    assert [float(batches.loss_of(trainer.model, batches[b])) for b in range(3)] == [1.5 * 3, 1.5 * 3, 1.0]
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        assert {name: state[name] for name in settings} == settings
    assert trainer.accelerator.num_processes == 2


def test_a_trainer_that_does_not_say_how_many_completions_makes_one_a_prompt(tmp_path: Path) -> None:
    """TRL's DistillationTrainer has no num_generations."""

    class Generating(Trainer):
        def _generate_and_score_completions(self, prompts: list[Any]) -> dict[str, Any]:
            return {"input_ids": torch.full((len(prompts), 5), 2)}

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return inputs["input_ids"].float().sum()

    trainer = trainer_of(tmp_path, ROWS, Generating)
    trainer.data_collator = list
    batches = trainer_micro_batches(trainer, 2)
    assert batches.loss_of is not None
    assert float(batches.loss_of(trainer.model, batches[0])) == 2 * 5 * 2


def test_rows_without_a_length_are_refused(tmp_path: Path) -> None:
    """Nor can they be sharded without an index."""

    class Indexed:
        def __getitem__(self, index: int) -> Any:
            return ROWS[index]

    for rows, name in ((iter(ROWS), "list_iterator"), (Indexed(), "Indexed"), (set(range(3)), "set")):
        stream: Any = SimpleNamespace(train_dataset=rows, data_collator=default_data_collator)
        with pytest.raises(UserError, match=f"expected training rows with a length, got {name}"):
            trainer_micro_batches(stream, 2)


def test_a_stream_gives_its_first_rows_and_is_read_no_further(tmp_path: Path) -> None:
    """Of a data set of the library, of torch and of a plain iterator, which loses what was read."""
    rows = [{"input_ids": [i, i + 1], "labels": [i, i + 1], "note": i} for i in range(5, 12)]
    read: list[int] = []

    def make() -> Iterator[dict[str, Any]]:
        for row in rows:
            read.append(row["note"])
            yield row

    for stream in (datasets.Dataset.from_list(rows).to_iterable_dataset(), make()):
        batches = trainer_micro_batches(trainer_of(tmp_path, stream, max_steps=1), 2, num_rows=3)
        assert [batch["input_ids"].tolist() for batch in batches] == [[[5, 6], [6, 7]], [[7, 8]]]
        assert set(batches[0]) == {"input_ids", "labels"}
    assert read == [5, 6, 7]


def test_notes_are_as_they_were(tmp_path: Path) -> None:
    trainer: Any = trainer_of(tmp_path, ROWS)
    trainer._metrics = {"train": {"entropy": [1.0]}}
    trainer.entropy_coef, trainer._entropy_window_stats, trainer._step = 0.5, None, 3
    with notes_kept(trainer):
        trainer._metrics["train"]["entropy"].append(2.0)
        trainer.entropy_coef, trainer._entropy_window_stats, trainer._step = 0.6, torch.ones(2), 4
        assert trainer.current_gradient_accumulation_steps == 1
    assert trainer._metrics == {"train": {"entropy": [1.0]}}
    assert (trainer.entropy_coef, trainer._entropy_window_stats, trainer._step) == (0.5, None, 3)
    assert not hasattr(trainer, "current_gradient_accumulation_steps")


def test_every_epoch_has_an_order_of_its_own_which_only_the_seed_decides() -> None:
    def passes(seed: int) -> list[list[int]]:
        order = EpochOrder(lambda generator: torch.randperm(20, generator=generator).tolist(), 20, seed)
        return [list(order) for _ in range(3)]

    assert passes(1) == passes(1) != passes(9)
    assert len({tuple(order) for order in passes(1)}) == 3
    assert all(sorted(order) == list(range(20)) for order in passes(1))
