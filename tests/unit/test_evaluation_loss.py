"""Evaluation loss in one process: the exact token-weighted mean, and a model left as it was found."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.ranks import on_ranks
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from piece_ds.data.collate import Collator
from piece_ds.evaluation import batches as dealing_module
from piece_ds.evaluation.batches import shard_batches
from piece_ds.evaluation.loss import LossResult, count_labels, evaluate_loss, standard_error_of_rise


class LabelMean(nn.Module):
    """Its "loss" is the mean of the counted labels, so that sums can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.frozen = nn.Dropout().eval()

    def forward(self, labels: Tensor, **_: Any) -> SimpleNamespace:
        assert not self.training
        assert not torch.is_grad_enabled()
        counted = labels[:, 1:]
        return SimpleNamespace(loss=counted[counted != -100].double().mean())


def row(*labels: int) -> dict[str, list[int]]:
    return {"input_ids": [1] * len(labels), "labels": list(labels)}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_loss_is_weighted_by_tokens_not_by_batches(batch_size: int) -> None:
    rows = [row(-100, 4), row(-100, 1, 2, 3), row(-100, -100, 10), row(-100, -100)]
    result = evaluate_loss(LabelMean(), rows, Collator(pad_id=0), batch_size, "cpu")
    assert (result.sum_loss, result.num_tokens) == (pytest.approx(20.0), 5)
    assert result.mean == pytest.approx(4.0)


def test_first_position_without_padding_is_not_counted() -> None:
    assert count_labels(torch.tensor([[5, 6, -100], [-100, 7, 8]])) == 3
    result = evaluate_loss(LabelMean(), [row(*[3] * 8)], Collator(pad_id=0), 1, "cpu")
    assert result.num_tokens == 7


def test_no_rows_give_no_tokens_and_nan() -> None:
    result = evaluate_loss(LabelMean(), [], Collator(pad_id=0), 4, "cpu")
    assert result.num_tokens == 0
    assert math.isnan(result.mean)


def test_every_submodule_keeps_its_mode_also_after_an_error() -> None:
    model = LabelMean()
    evaluate_loss(model, [row(1, 2)], Collator(pad_id=0), 1, "cpu")
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    with pytest.raises(KeyError):
        evaluate_loss(model, [{"input_ids": [1]}], Collator(pad_id=0), 1, "cpu")
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 4, 7])
def test_rows_are_dealt_once_and_in_step(monkeypatch: pytest.MonkeyPatch, num_ranks: int, num_rows: int) -> None:
    lengths = [3, 1, 4, 1, 5, 9, 2][:num_rows]
    monkeypatch.setattr(dealing_module, "world_size", lambda: num_ranks)
    dealt = []
    for rank in range(num_ranks):
        monkeypatch.setattr(dealing_module, "rank", lambda rank=rank: rank)
        dealt.append(shard_batches(lengths, batch_size=2))
    assert len({len(shares) for shares in dealt}) == 1
    counted = [index for shares in dealt for share in shares if share.counted for index in share.indices]
    assert sorted(counted) == list(range(num_rows))
    assert all(share.indices for shares in dealt for share in shares)


def test_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        shard_batches([1], batch_size=0)


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, initializer_range=0.5, **shape)).train()


def test_loss_of_a_real_model_is_that_of_each_row_alone(llama: LlamaForCausalLM) -> None:
    rows = [row(-100, 4, 9), row(-100, 1, 2, 3, 5, 6, 7, 8, 9), row(7, -100, 10)]
    by_hand = 0.0
    for one in rows:
        logits = llama(input_ids=torch.tensor([one["input_ids"]])).logits[0].double().log_softmax(dim=-1)
        labels = enumerate(one["labels"][1:])
        by_hand -= sum(logits[position, label].item() for position, label in labels if label != -100)
    result = evaluate_loss(llama, rows, Collator(pad_id=0), 2, "cpu")
    assert result.num_tokens == 11
    assert result.sum_loss == pytest.approx(by_hand, rel=1e-5)


def test_three_batches_on_two_ranks_count_once_each() -> None:
    """The rank without a batch runs one again, to stay in step, and does not count it."""
    rows = [row(-100, 4), row(-100, 1, 2, 3), row(-100, -100, 10)]
    found = on_ranks(2, lambda: evaluate_loss(LabelMean(), rows, Collator(pad_id=0), 1, "cpu"))
    assert [(one.sum_loss, one.num_tokens) for one in found] == [(pytest.approx(20.0), 5)] * 2
    # By batch, as one rank has it.
    alone = evaluate_loss(LabelMean(), rows, Collator(pad_id=0), 1, "cpu")
    assert found == [alone, alone]
    assert alone.batches == ((pytest.approx(6.0), 3), (pytest.approx(10.0), 1), (pytest.approx(4.0), 1))


def test_the_standard_error_of_a_rise_is_that_of_many_samples() -> None:
    """Drawn again and again from one population, the rise scatters by as much as one sample says."""
    generator = torch.Generator().manual_seed(0)

    def sample() -> tuple[LossResult, LossResult]:
        tokens = torch.randint(20, 60, (64,), generator=generator)
        hardness = 3 + torch.randn(64, generator=generator)
        rises = 0.1 + 0.2 * torch.randn(64, generator=generator)
        parts = [
            [(float(v), int(n)) for v, n in zip(x * tokens, tokens, strict=True)] for x in (hardness, hardness + rises)
        ]
        before, after = (LossResult(sum(v for v, _ in part), int(tokens.sum()), tuple(part)) for part in parts)
        return before, after

    samples = [sample() for _ in range(400)]
    scatter = torch.tensor([after.mean - before.mean for before, after in samples]).std().item()
    said = sum(standard_error_of_rise(*one) for one in samples) / len(samples)
    assert said == pytest.approx(scatter, rel=0.1)
    assert scatter < 0.05  # the rows' hardness, which scatters by 1 / 8, cancels


def test_one_batch_says_nothing_of_others() -> None:
    one = LossResult(4.0, 2, ((4.0, 2),))
    assert standard_error_of_rise(one, LossResult(6.0, 2, ((6.0, 2),))) == 0.0
    assert standard_error_of_rise(LossResult(0.0, 0), LossResult(0.0, 0)) == 0.0
