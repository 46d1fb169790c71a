"""Runs whose ranks share rows: what is refused before a weight is read; attention exchanges only in training."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from datasets import Dataset
from deepspeed.runtime.sequence_parallel import ulysses_sp
from support.models import make_model
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from piece_ds.config.arguments import ModelArguments
from piece_ds.methods.registry import find_method
from piece_ds.preflight import sequences
from piece_ds.runtime.errors import UserError
from piece_ds.training.sequences import sequence_training
from piece_ds.training.trainer import TaskTrainer
from piece_ds.zero import sequence_attention
from piece_ds.zero.sequence_attention import exchanging_attention, sharing_engines


def refusal(method: str = "piece-s", world: int = 4, size: int = 2, **changes: Any) -> str:
    """What check_sequences() says of a run that would be taken, but for some changes."""

    def of(**values: Any) -> SimpleNamespace:
        return SimpleNamespace(**{name: changes.pop(name, value) for name, value in values.items()})

    settings = SimpleNamespace(
        model=of(sequence_parallel_size=size, attn_implementation=None, loss_chunk_tokens=0),
        data=of(packing=False),
        method=of(general_replay=None, general_kl=None, step_scale="none", mask_file=None, importance_batch_size=2),
    )
    arguments = of(label_smoothing_factor=0.0, neftune_noise_alpha=None, per_device_train_batch_size=2)
    task = of(has_images=False, train=Dataset.from_dict({"input_ids": [[1] * 9, [1] * 17]}))
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=changes.pop("kv_heads", 4))
    config.sliding_window = changes.pop("window", None)
    assert not changes
    with mock.patch.object(sequences, "world_size", return_value=world):
        try:
            sequences.check_sequences(settings, arguments, config, [task], find_method(method))
        except UserError as error:
            return str(error)
    return ""


def test_what_ranks_cannot_share_is_refused_by_name() -> None:
    for changes, said in (
        ({}, ""),
        ({"size": 4}, ""),
        ({"size": 1, "packing": True}, ""),
        ({"window": 17}, ""),
        ({"attn_implementation": "flash_attention_2"}, ""),
        ({"importance_batch_size": 3, "mask_file": "mask"}, ""),
        ({"method": "piece-ratio"}, ""),
        ({"world": 3}, "does not divide the 3 ranks"),
        ({"kv_heads": 1}, "num_key_value_heads 1"),
        ({"kv_heads": 3}, "num_key_value_heads 3"),
        ({"window": 16}, "longest row has 17 tokens"),
        ({"attn_implementation": "eager"}, "got eager"),
        ({"method": "migu"}, "--method migu"),
        ({"method": "ssu"}, "--method ssu"),
        ({"method": "seqft"}, "--method seqft"),
        ({"packing": True}, "--packing"),
        ({"has_images": True}, "images"),
        ({"loss_chunk_tokens": 8}, "--loss_chunk_tokens"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "--neftune_noise_alpha"),
        ({"general_replay": 0.5, "general_kl": 2.0}, ""),
        ({"step_scale": "general"}, ""),
        ({"importance_batch_size": 3}, "--importance_batch_size 3"),
    ):
        found = refusal(**changes)
        assert said in found, (changes, found)
        assert bool(said) == bool(found), (changes, found)
    with pytest.raises(UserError, match="--sequence_parallel_size"):
        ModelArguments(sequence_parallel_size=0)
    assert sequence_training(1, 2) is None


class Exchange:
    """In DeepSpeed's place: notes what it is given."""

    def __init__(self, **options: Any) -> None:
        self.options, self.masks = options, []
        made.append(self)

    def __call__(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[Any, None]:
        self.masks.append(mask)
        return self.options["attn"](module, query, key, value, mask, **kwargs)


made: list[Exchange] = []


def test_attention_exchanges_in_training_mode_only_and_is_restored() -> None:
    """In evaluation the padding mask stays: prompts are padded on the left there."""
    model, plain = make_model("llama"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    ids, attention = torch.arange(1, 9).view(1, 8), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    expected = model.eval()(input_ids=ids, attention_mask=attention).logits
    with (
        mock.patch.object(sequence_attention, "sequence_groups", mock.Mock()),
        mock.patch.object(ulysses_sp, "UlyssesSPAttentionHF", Exchange),
    ):
        for _ in range(2):  # a run has an engine for every task
            with exchanging_attention(model, 2, 3):
                assert torch.equal(model.eval()(input_ids=ids, attention_mask=attention).logits, expected)
                assert made[-1].masks == []
                model.train()(input_ids=ids, attention_mask=attention)
                assert made[-1].masks == [None, None]  # a layer each
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
            assert made[-1].options["attn"] is plain
            assert made[-1].options["batch_size"] == 3

    model.config._attn_implementation = "eager"
    with pytest.raises(UserError, match="attention 'eager'"), exchanging_attention(model, 2, 3):
        pass


def test_engines_get_the_groups_and_deepspeed_counts_rows_itself() -> None:
    with (
        mock.patch.object(deepspeed, "initialize") as initialize,
        mock.patch.object(sequence_attention, "sequence_groups", return_value="groups"),
        sharing_engines(2),
    ):
        deepspeed.initialize(model=1, config_params={"train_batch_size": 8, "gradient_clipping": 1.0})
        initialize.assert_called_once_with(model=1, config_params={"gradient_clipping": 1.0}, mpu="groups")


def test_a_micro_batch_of_shared_rows_returns_its_own_loss() -> None:
    """Divided by the micro-batches of a step if it is a mean, as the Trainer's own is."""
    steps: list[tuple[Any, ...]] = []

    def step(*given: Any) -> torch.Tensor:
        steps.append(given)
        return torch.tensor(float(len(steps)))

    trainer = object.__new__(TaskTrainer)
    trainer.losses, trainer._num_tokens = [], torch.zeros((), dtype=torch.int64)
    trainer.sequences, trainer.current_gradient_accumulation_steps = SimpleNamespace(step=step), 4  # type: ignore[assignment]
    model = torch.nn.Linear(1, 1).eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    found = [float(trainer.training_step(model, inputs, number)) for number in (None, None, 8, 8)]
    assert found == [1 / 4, 2 / 4, 3.0, 4.0]
    assert [float(loss) for loss in trainer.losses] == [1.0, 2.0, 3.0, 4.0]
    assert steps == [(trainer, model, inputs, number, None) for number in (None, None, 8, 8)]
    assert model.training
    assert (int(trainer.take_num_tokens()), int(trainer.take_num_tokens())) == (8, 0)
